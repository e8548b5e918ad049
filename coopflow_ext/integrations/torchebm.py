"""torchebm's Langevin sampler (0.8.9) on top of :class:`LangevinSampler`.

    from coopflow_ext.integrations.torchebm import LangevinDynamics

The constructor, ``sample()`` and what a torchebm sampler inherits are torchebm's. Beside its
models, any nn.Module or callable that returns U as (B,), (B, 1) or (B, 1, 1, 1) will do. torchebm
need not be installed; where it is, the sampler is one of its ``BaseSampler``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coopflow_ext._checks import check_count, check_flag, check_number
from coopflow_ext.errors import NonFiniteError
from coopflow_ext.integrations._torchebm_base import (
    BaseSampler,
    ConstantScheduler,
    EulerMaruyamaIntegrator,
    Schedulable,
    Scheduler,
    resolve_integrator,
)
from coopflow_ext.rng import Key
from coopflow_ext.samplers.checks import check_constant, check_kwargs, check_steps
from coopflow_ext.samplers.gradient import StateFunction, module_of
from coopflow_ext.samplers.langevin import LangevinSampler
from coopflow_ext.samplers.nested import map_tensors

__all__ = ["LangevinDynamics"]

_MAX_SAMPLERS = 4  # kept for their captured and compiled chains

Result = Tensor | tuple[Tensor, dict[str, Tensor]]


class LangevinDynamics(BaseSampler):  # type: ignore[misc]
    """x ← x − η·∇U(x) + √(2η)·noise_scale·ξ, then clamped.

    Its arguments are attributes that may be set between calls. As in torchebm, ``dtype`` and
    ``device`` are those of the model's parameters, where it has some, and every scheduler in the
    sampler and its model moves on after each step. Where the model holds a scheduler, or is a
    function beside a scheduled argument, or another scheduler is registered, the model may change
    from step to step: then the steps run one at a time, without CUDA graphs.

    Args:
        model: a torchebm model (its own ``gradient``, where it has one, is used), an nn.Module or a
            callable giving U.
        step_size: η, a number > 0 or a torchebm scheduler.
        noise_scale: a number > 0 or a torchebm scheduler.
        decay: torchebm accepts and ignores it; here only 0 is accepted.
        clamp: (lo, hi) after every step.
        dtype: of the state, where the model has no parameters.
        device: likewise; by default that of the model's buffers, else the CPU.
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
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        device = _device_of(model) if device is None else torch.device(device)
        super().__init__(model=model, dtype=dtype, device=device)
        self._options = options
        self._samplers: OrderedDict[Any, tuple[StateFunction, LangevinSampler]] = OrderedDict()
        self.step_size = step_size
        self.noise_scale = noise_scale
        self.clamp = clamp
        self.decay = decay
        self.integrator = resolve_integrator(
            integrator, owner=type(self).__name__, device=self.device, dtype=self.dtype
        )
        self._check_honoured()
        self._sampler(0, 0.0, 0.0, 1, keep=False)  # refuses a wrong model or option now

    @property
    def step_size(self) -> float:
        """η at present."""
        return float(self.get_scheduled_value("step_size"))

    @step_size.setter
    def step_size(self, value: float | Scheduler) -> None:
        self.register_scheduler("step_size", _scheduler("step_size", value))

    @property
    def noise_scale(self) -> float:
        """The factor of the noise at present."""
        return float(self.get_scheduled_value("noise_scale"))

    @noise_scale.setter
    def noise_scale(self, value: float | Scheduler) -> None:
        self.register_scheduler("noise_scale", _scheduler("noise_scale", value))

    @property
    def clamp(self) -> tuple[float, float] | None:
        """The bounds of the state, or None."""
        return self._clamp

    @clamp.setter
    def clamp(self, clamp: tuple[float, float] | None) -> None:
        if clamp is not None and not (isinstance(clamp, (tuple, list)) and len(clamp) == 2):
            raise TypeError(f"clamp must be a pair (min, max), got {clamp!r}")
        if clamp is not None and clamp[0] >= clamp[1]:
            raise ValueError(f"clamp min must be < max, got {clamp}")
        self._clamp = None if clamp is None else (clamp[0], clamp[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the state; setting it is ``to(dtype)``."""
        dtype: torch.dtype = super().dtype
        return dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.to(dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Of the state; setting it is ``to(device)``."""
        device: torch.device = super().device
        return device

    @device.setter
    def device(self, device: str | torch.device) -> None:
        self.to(device=device)

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
        if isinstance(thin, int) and not isinstance(thin, bool) and thin < 1:
            raise ValueError(f"thin must be >= 1, got {thin}")
        check_count("thin", thin, 1)
        check_steps(n_steps)
        flags = {"return_trajectory": return_trajectory, "return_diagnostics": return_diagnostics,
                 "reset_schedulers": reset_schedulers}  # fmt: skip
        for name, flag in flags.items():
            check_flag(name, flag)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        self._check_honoured()
        start = self._start(x, dim, n_samples, generator)
        kwargs = self._model_kwargs(model_kwargs, y)
        key = _key(generator)
        if reset_schedulers:
            self.reset_schedulers()
        run = self._run_step_by_step if self._model_may_change() else self._run_chain
        keep = return_trajectory or return_diagnostics
        with self.autocast_context():
            end, kept, energies = run(
                start, key, kwargs, n_steps, thin, keep=keep, with_energy=return_diagnostics
            )
        result = kept.transpose(0, 1).contiguous() if return_trajectory else end
        return (result, _diagnostics(kept, energies)) if return_diagnostics else result

    def _check_honoured(self) -> None:
        """ValueError for what torchebm has and this sampler does not."""
        if self.decay != 0:
            raise ValueError(f"decay is not supported and must be 0, got {self.decay}")
        if type(self.integrator) is not EulerMaruyamaIntegrator:
            given = self.integrator
            name = given if isinstance(given, str) else type(given).__name__
            raise ValueError(f"integrator must be Euler-Maruyama, got {name}")

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
                raise ValueError(
                    "y was passed both as y= and inside model_kwargs['y']; provide it once"
                )
            kwargs = {**kwargs, "y": y}
        device = self.device
        moved: dict[str, Any] = map_tensors(lambda t: t.to(device), kwargs)
        return moved

    def _model_may_change(self) -> bool:
        """Whether the model may read a scheduler, so that its steps are not those of one chain."""
        moving = [s for s in self._all_schedulers() if not isinstance(s, ConstantScheduler)]
        if not moving:
            return False
        own = [self.schedulers["step_size"], self.schedulers["noise_scale"]]
        module = module_of(self.model)
        return (
            any(all(s is not mine for mine in own) for s in moving)
            or module is None
            or _holds_scheduler(module)
        )

    def _all_schedulers(self) -> list[Scheduler]:
        """Those that ``step_schedulers`` advances, each as often as it does."""
        found: list[Scheduler] = []

        def collect(module: nn.Module) -> None:
            if isinstance(module, Schedulable):
                found.extend(module.schedulers.values())

        self.apply(collect)
        return found

    def _run_chain(
        self, x: Tensor, key: Key, kwargs: dict[str, Any], n_steps: int, thin: int,
        *, keep: bool, with_energy: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """The last state, the kept ones (n_kept, B, …) and their mean energies."""
        drift, noise = self._advance(n_steps)
        sampler = self._sampler(n_steps, drift, noise, thin, keep=keep)
        out = sampler(x, key=key, model_kwargs=kwargs)
        assert isinstance(out.x, Tensor)
        kept = x.new_empty(0, *x.shape) if out.trajectory is None else out.trajectory
        assert isinstance(kept, Tensor)
        return out.x, kept, [self._mean_energy(x, kwargs) for x in kept if with_energy]

    def _run_step_by_step(
        self, x: Tensor, key: Key, kwargs: dict[str, Any], n_steps: int, thin: int,
        *, keep: bool, with_energy: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """The same, and the same noise, with a step of the schedulers after each of the chain."""
        for name in ("cuda_graph", "compile"):
            if self._options.get(name) is True:
                raise ValueError(f"{name}=True: the model's schedulers change it at every step")
        state, kept, energies = x.clone(), [], []
        for step in range(n_steps):
            coefficients = _coefficients(self.step_size, self.noise_scale)
            sampler = self._sampler(1, *coefficients, 1, keep=False, cuda_graph=False)
            try:
                out = sampler(state, key=key, model_kwargs=kwargs)
            except NonFiniteError as error:
                message = f"{error} (step {step} of the call, whose steps run one at a time)"
                raise NonFiniteError(message, step=step, chains=error.chains, x=error.x) from error
            assert isinstance(out.x, Tensor)
            state, key = out.x, out.key
            self.step_schedulers()
            if keep and (step + 1) % thin == 0:
                kept.append(state)
                if with_energy:
                    energies.append(self._mean_energy(state, kwargs))
        return state, torch.stack(kept) if kept else x.new_empty(0, *x.shape), energies

    def _advance(self, n_steps: int) -> tuple[Any, Any]:
        """Drift and noise of the next steps, floats or tables; every scheduler moves past them."""
        schedulers = self._all_schedulers()
        rows = []
        for _ in range(n_steps):
            rows.append((self.step_size, self.noise_scale))
            for scheduler in schedulers:
                scheduler.step()
        if len(set(rows)) > 1:
            table = torch.tensor(rows, dtype=torch.float64)
            return table[:, 0], table[:, 1] * (2 * table[:, 0]).sqrt()
        return _coefficients(*rows[0]) if rows else (0.0, 0.0)

    def _sampler(
        self, n_steps: int, drift: Any, noise: Any, thin: int, *, keep: bool, **options: Any
    ) -> LangevinSampler:
        """The sampler of such a call, made anew or one of the last used."""
        schedule = tuple(tuple(c.tolist()) if isinstance(c, Tensor) else c for c in (drift, noise))
        function = _energy_or_score(self.model)
        kind = (tuple(function), n_steps, schedule, thin, keep, self.clamp, tuple(options.items()))
        model, sampler = self._samplers.get(kind, (None, None))
        if sampler is None or model is not self.model:
            sampler = LangevinSampler(
                **function, n_steps=n_steps, drift=drift, noise=noise, clamp=self.clamp,
                thin=thin, return_trajectory=keep, **{**self._options, **options},
            )  # fmt: skip
            self._samplers[kind] = self.model, sampler
            if len(self._samplers) > _MAX_SAMPLERS:
                self._samplers.popitem(last=False)
        self._samplers.move_to_end(kind)
        return sampler

    def _mean_energy(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        mean: Tensor = self.model(x, **kwargs).mean()
        return mean

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(model={type(self.model).__name__}, "
            f"step_size={self.step_size}, noise_scale={self.noise_scale}, "
            f"integrator={type(self.integrator).__name__})"
        )


def _scheduler(name: str, value: float | Scheduler) -> Scheduler:
    """A constant one for a number > 0; ValueError or TypeError otherwise."""
    if isinstance(value, Scheduler):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        check_constant(name, value)
        value = value.item()
    number = check_number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    scheduler: Scheduler = ConstantScheduler(number)
    return scheduler


def _holds_scheduler(module: nn.Module) -> bool:
    """Whether a part of it has one that moves among its attributes, or in a list or dict there."""
    for part in module.modules():
        for value in vars(part).values():
            items = value.values() if isinstance(value, dict) else value
            for item in items if isinstance(value, (dict, list, tuple)) else (value,):
                if hasattr(item, "get_value") and not isinstance(item, ConstantScheduler):
                    return True
    return False


def _coefficients(step_size: float, noise_scale: float) -> tuple[float, float]:
    return step_size, noise_scale * float((2 * step_size) ** 0.5)


def _diagnostics(kept: Tensor, energies: list[Tensor]) -> dict[str, Tensor]:
    """Over the chains of the kept states, (n_kept, B, …)."""
    variance = kept.var(dim=1, unbiased=False).clamp(min=1e-10, max=1e10)
    return {
        "mean": kept.mean(dim=1),
        "var": torch.zeros_like(variance) if kept.shape[1] == 1 else variance,
        "energy": torch.stack(energies).to(kept.dtype) if energies else kept.new_zeros(0),
    }


def _device_of(model: object) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def _energy_or_score(model: StateFunction) -> dict[str, Any]:
    """The model as LangevinSampler's energy; as score where its ``gradient`` is more than ∇U by
    autograd: a closed form, or torchebm's own in another precision."""
    gradient = getattr(type(model), "gradient", None)
    precision = ("force_fp32_gradient", "use_mixed_precision")
    if gradient is None or (
        gradient.__module__ == "torchebm.core.base_model"
        and not any(getattr(model, name, False) for name in precision)
    ):
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
