"""torchebm's Langevin sampler (0.8.9) on top of :class:`LangevinSampler`.

    from coopflow_ext.integrations.torchebm import LangevinDynamics

The constructor and ``sample()`` take torchebm's arguments. Beside its models, any nn.Module or
callable that returns U as (B,), (B, 1) or (B, 1, 1, 1) will do. torchebm need not be installed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from coopflow_ext.rng import Key
from coopflow_ext.samplers.call import check_kwargs
from coopflow_ext.samplers.gradient import StateFunction
from coopflow_ext.samplers.langevin import LangevinSampler
from coopflow_ext.samplers.schedule import check_count, check_flag, check_number

__all__ = ["LangevinDynamics"]

_MAX_SAMPLERS = 4  # kept for their captured and compiled chains
_EULER_MARUYAMA = ("euler", "euler_maruyama", "EulerMaruyamaIntegrator")

Result = Tensor | tuple[Tensor, dict[str, Tensor]]


@runtime_checkable
class Scheduler(Protocol):
    """What is used of torchebm's ``BaseScheduler``."""

    def get_value(self) -> float: ...
    def step(self) -> float: ...
    def reset(self) -> None: ...


class LangevinDynamics:
    """x ← x − η·∇U(x) + √(2η)·noise_scale·ξ, then clamped.

    Args:
        model: a torchebm model (its own ``gradient``, where it has one, is used), an nn.Module or a
            callable giving U.
        step_size: η, a number > 0 or a torchebm scheduler.
        noise_scale: a number > 0 or a torchebm scheduler.
        decay: torchebm accepts and ignores it; here only 0 is accepted.
        clamp: (lo, hi) after every step.
        dtype: of the state.
        device: of the state; by default that of the model's parameters, else the CPU.
        integrator: None, "euler_maruyama", "euler", or torchebm's EulerMaruyamaIntegrator: the
            update above. Others are refused.
        options: further arguments of :class:`LangevinSampler`, such as ``cuda_graph``.

    Raises:
        ValueError, TypeError: for an argument that is out of range or not honoured, by name.
    """

    def __init__(
        self,
        model: StateFunction,
        step_size: float | Scheduler = 1e-3,
        noise_scale: float | Scheduler = 1.0,
        decay: float = 0.0,
        clamp: tuple[float, float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        integrator: Any = None,
        **options: Any,
    ) -> None:
        if decay != 0:
            raise ValueError(f"decay is not supported and must be 0, got {decay}")
        if clamp is not None and not (isinstance(clamp, (tuple, list)) and len(clamp) == 2):
            raise TypeError(f"clamp must be a pair (min, max), got {clamp!r}")
        if clamp is not None and clamp[0] >= clamp[1]:
            raise ValueError(f"clamp min must be < max, got {clamp}")
        name = integrator if isinstance(integrator, str) else type(integrator).__name__
        if integrator is not None and name not in _EULER_MARUYAMA:
            raise ValueError(f"integrator must be Euler-Maruyama, got {name}")
        self.model, self.clamp, self.dtype = model, clamp, dtype
        self.step_size = _check_parameter("step_size", step_size)
        self.noise_scale = _check_parameter("noise_scale", noise_scale)
        self.device = _device_of(model) if device is None else torch.device(device)
        self._function = _energy_or_score(model)
        self._options = options
        self._samplers: OrderedDict[Any, LangevinSampler] = OrderedDict()
        self._sampler(0, 0.0, 0.0, 1, keep=False)  # refuses a wrong model or option now

    @torch.no_grad()
    def sample(
        self,
        x: Tensor | None = None,
        dim: int | tuple[int, ...] | None = None,
        n_steps: int = 100,
        n_samples: int = 1,
        thin: int = 1,
        return_trajectory: bool = False,
        return_diagnostics: bool = False,
        reset_schedulers: bool = True,
        *,
        y: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Result:
        """Run chains; every argument has torchebm's meaning.

        Args:
            x: start (B, …); None draws N(0, I) of shape (n_samples, *dim).
            dim: an int or a shape.
            n_steps, n_samples, thin: counts ≥ 1.
            return_trajectory: (B, n_steps // thin, …) instead of the last state.
            return_diagnostics: also a dict of ``mean``, ``var`` (n_kept, …) and ``energy``
                (n_kept,) over the chains.
            reset_schedulers: start schedulers from step 0; they are advanced by n_steps.
            y: shorthand for model_kwargs={"y": y}.
            model_kwargs: passed to the model.
            generator: draws the start and this package's seed, so that it determines the samples;
                None: torch's default generator.

        Raises:
            ValueError, TypeError: for a bad argument. NonFiniteError: a chain blew up.
        """
        check_count("thin", thin, 1)
        check_count("n_steps", n_steps, 0)
        flags = {"return_trajectory": return_trajectory, "return_diagnostics": return_diagnostics,
                 "reset_schedulers": reset_schedulers}  # fmt: skip
        for name, flag in flags.items():
            check_flag(name, flag)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        start = self._start(x, dim, n_samples, generator)
        kwargs = self._model_kwargs(model_kwargs, y)
        drift, noise = self._coefficients(n_steps, reset_schedulers)
        keep = return_trajectory or return_diagnostics
        sampler = self._sampler(n_steps, drift, noise, thin, keep=keep)
        out = sampler(start, key=_key(generator), model_kwargs=kwargs)
        assert isinstance(out.x, Tensor)
        if not keep:
            return out.x
        assert isinstance(out.trajectory, Tensor)
        result = out.trajectory.transpose(0, 1).contiguous() if return_trajectory else out.x
        if not return_diagnostics:
            return result
        return result, self._diagnostics(out.trajectory, kwargs)

    def _start(
        self,
        x: Tensor | None,
        dim: int | tuple[int, ...] | None,
        n_samples: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        if x is not None:
            if not isinstance(x, Tensor):
                raise TypeError(f"x must be a tensor (B, …), got {type(x).__name__}")
            return x.to(self.device, self.dtype)
        if dim is None:
            raise ValueError("dim must be provided when x is None")
        shape = [check_count("dim", d, 0) for d in ((dim,) if isinstance(dim, int) else dim)]
        n = check_count("n_samples", n_samples, 0)
        return torch.randn((n, *shape), dtype=self.dtype, device=self.device, generator=generator)

    def _model_kwargs(self, given: Mapping[str, Any] | None, y: Tensor | None) -> dict[str, Any]:
        kwargs = check_kwargs(given)
        if y is not None:
            if "y" in kwargs:
                raise ValueError("y was passed both as y= and inside model_kwargs['y']")
            kwargs["y"] = y
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}

    def _coefficients(self, n_steps: int, reset: bool) -> tuple[Any, Any]:
        """Drift and noise, floats or one value for each step; advances the schedulers."""
        parameters = self.step_size, self.noise_scale
        # torchebm advances a scheduler once for each parameter that it is, so twice if it is both.
        schedulers = [p for p in parameters if isinstance(p, Scheduler)]
        if not schedulers:
            eta, scale = float(self.step_size), float(self.noise_scale)  # type: ignore[arg-type]
            return eta, scale * (2 * eta) ** 0.5
        if reset:
            for scheduler in schedulers:
                scheduler.reset()
        rows = []
        for _ in range(n_steps):
            rows.append([p.get_value() if isinstance(p, Scheduler) else p for p in parameters])
            for scheduler in schedulers:
                scheduler.step()
        table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1] * (2 * table[:, 0]).sqrt()

    def _sampler(
        self, n_steps: int, drift: Any, noise: Any, thin: int, *, keep: bool
    ) -> LangevinSampler:
        """The sampler of such a call, made anew or one of the last used."""
        schedule = tuple(tuple(c.tolist()) if isinstance(c, Tensor) else c for c in (drift, noise))
        kind = (n_steps, schedule, thin, keep)
        if kind not in self._samplers:
            self._samplers[kind] = LangevinSampler(
                **self._function, n_steps=n_steps, drift=drift, noise=noise, clamp=self.clamp,
                thin=thin, return_trajectory=keep, **self._options,
            )  # fmt: skip
            if len(self._samplers) > _MAX_SAMPLERS:
                self._samplers.popitem(last=False)
        self._samplers.move_to_end(kind)
        return self._samplers[kind]

    def _diagnostics(self, trajectory: Tensor, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Of the kept states, (n_kept, B, …)."""
        single = trajectory.shape[1] == 1
        variance = trajectory.var(dim=1, unbiased=False).clamp(min=1e-10, max=1e10)
        energies = [self.model(x, **kwargs).mean() for x in trajectory]
        return {
            "mean": trajectory.mean(dim=1),
            "var": torch.zeros_like(variance) if single else variance,
            "energy": torch.stack(energies) if energies else trajectory.new_zeros(0),
        }

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(model={type(self.model).__name__}, "
            f"step_size={self.step_size}, noise_scale={self.noise_scale})"
        )


def _check_parameter(name: str, value: float | Scheduler) -> float | Scheduler:
    if isinstance(value, Scheduler):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return check_number(name, value, minimum=0.0, exclusive=True)


def _device_of(model: object) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def _energy_or_score(model: StateFunction) -> dict[str, Any]:
    """The model as LangevinSampler's energy; with a closed-form gradient of its own, as score."""
    gradient = getattr(type(model), "gradient", None)
    if gradient is None or gradient.__module__ == "torchebm.core.base_model":
        return {"energy": model}
    return {"score": _Score(model)}


class _Score(nn.Module):
    """−∇U of a model that has its own ``gradient(x)`` or ``gradient(x, model_kwargs)``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, **model_kwargs: Any) -> Tensor:
        if model_kwargs:
            gradient: Tensor = self.model.gradient(x, model_kwargs=model_kwargs)
        else:
            gradient = self.model.gradient(x)
        return -gradient


def _key(generator: torch.Generator | None) -> Key:
    if generator is None:
        return Key.from_default_generator()
    words = torch.randint(0, 2**32, (2,), generator=generator, device=generator.device)
    low, high = words.tolist()
    return Key(low | (high << 32))
