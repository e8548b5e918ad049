"""The two models and the chain between them, and how they are built from settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coopflow_ext import energies, flows, ops
from coopflow_ext._checks import check_count, check_counts
from coopflow_ext._model_state import in_mode
from coopflow_ext._modes import seeded, usual_tensors
from coopflow_ext.autocast import full_precision, in_precision
from coopflow_ext.coop.checkpoint import load_checkpoint, load_latest, save_checkpoint
from coopflow_ext.coop.config import TrainConfig
from coopflow_ext.coop.contents import Contents, naming
from coopflow_ext.data.toy import EXTENT
from coopflow_ext.errors import RunError
from coopflow_ext.flows.official import infer_flow_options, load_official, read_official
from coopflow_ext.rng import TIME_LIMIT, USE_CHAIN, USE_INIT, Key, stream
from coopflow_ext.samplers import LangevinSampler, ReplayBuffer

_FLOWS: dict[str, Callable[..., flows.Flow]] = {
    "realnvp": flows.realnvp,
    "glow": flows.glow,
    "flowpp": flows.flowpp,
}
_ENERGIES = ("res", "mlp")


@dataclass(frozen=True)
class EventSpec:
    """What the models must know of the data: event shape, and grey levels (None for vectors)."""

    shape: tuple[int, ...]
    levels: int | None

    @classmethod
    def from_dict(cls, values: Any) -> EventSpec:
        """From the attributes by name; ValueError, TypeError or KeyError where they are not."""
        shape = tuple(check_count("event.shape", n, 1) for n in values["shape"])
        levels = values["levels"]
        return cls(shape, None if levels is None else check_count("event.levels", levels, 2))

    @property
    def range(self) -> tuple[float, float]:
        """Where uniform noise for the start of a chain lies."""
        return (-EXTENT, EXTENT) if self.levels is None else (-1.0, 1.0)

    @property
    def clamp(self) -> tuple[float, float] | None:
        """The range to which chains are clamped."""
        return None if self.levels is None else (-1.0, 1.0)


def build_flow(config: TrainConfig, event: EventSpec) -> flows.Flow:
    """The flow that the settings name; ValueError for an unknown name or option."""
    if config.flow not in _FLOWS:
        raise ValueError(f"flow must be one of {', '.join(_FLOWS)}, got {config.flow!r}")
    options: dict[str, Any] = {}
    if event.levels is not None:
        options = {"image_shape": event.shape, "levels": event.levels}
    elif config.flow == "realnvp":
        options = {"dim": event.shape[0]}
    else:
        raise ValueError(f"flow must be realnvp for vectors, got {config.flow!r}")
    for name in sorted(config.flow_options.keys() & {"dim", "image_shape", "levels"}):
        raise ValueError(f"flow_options must not have {name}, which follows from the data")
    try:
        flow = _FLOWS[config.flow](**options, **config.flow_options)
    except TypeError as error:
        raise ValueError(f"flow_options do not fit {config.flow}: {error}") from error
    flow.compile_blocks = config.compile
    return flow


def build_energy(config: TrainConfig, event: EventSpec) -> nn.Module:
    """The energy that the settings name; ValueError for an unknown name or option."""
    if config.energy not in _ENERGIES:
        raise ValueError(f"energy must be one of {', '.join(_ENERGIES)}, got {config.energy!r}")
    try:
        if config.energy == "mlp":
            dim = torch.Size(event.shape).numel()
            return energies.MLPEnergy(dim, **config.energy_options)
        if len(event.shape) != 3 or event.shape[1] != event.shape[2]:
            raise ValueError(f"energy must be mlp for events of shape {event.shape}, got 'res'")
        channels, size, _ = event.shape
        return energies.ResEnergy(channels, image_size=size, **config.energy_options)
    except TypeError as error:
        raise ValueError(f"energy_options do not fit {config.energy}: {error}") from error


def build_sampler(
    config: TrainConfig, energy: nn.Module, event: EventSpec, *, training: bool, **options: Any
) -> LangevinSampler:
    """The chain toward ``energy``: that of training, or that of sampling afterwards.

    ``options`` are further ones of :class:`LangevinSampler`, or replace those of the settings.
    """
    delta = config.step_size
    if not training and config.sample_step_size is not None:
        delta = config.sample_step_size
    settings: dict[str, Any] = {
        "n_steps": config.langevin_steps,
        "drift": delta * delta / 2,
        "noise": config.noise,
        "step_clip": config.step_clip,
        "clamp": event.clamp,
        "autocast": torch.bfloat16 if config.precision == "bfloat16" else None,
        "compile": config.compile,
    }
    return LangevinSampler(energy, **{**settings, **options})


def build_buffer(config: TrainConfig, event: EventSpec) -> ReplayBuffer:
    """Persistent chains that start as uniform noise."""
    return ReplayBuffer(
        event.shape,
        size=config.buffer_size,
        reinit_probability=config.buffer_reinit,
        init=partial(_uniform_between, *event.range),
        key=Key(config.seed),
    )


def _uniform_between(low: float, high: float, shape: tuple[int, ...], key: Key) -> Tensor:
    return low + (high - low) * ops.uniform(shape, key.tensor())


class CoopFlow(nn.Module):
    """A flow that proposes and an energy-based model whose Langevin chain refines.

    Args:
        flow: a :class:`coopflow_ext.flows.Flow`.
        energy: U(x), (B, …) → (B,).
        sampler: a sampler of ``energy``: called as ``sampler(x0, key=key).x``.

    Source: Xie, Zhu, Li, Li, *A Tale of Two Flows*, ICLR 2022, arXiv 2205.06924.
    """

    def __init__(self, flow: flows.Flow, energy: nn.Module, sampler: LangevinSampler) -> None:
        super().__init__()
        self.flow = flow
        self.energy = energy
        self.sampler = sampler
        self.config: TrainConfig | None = None
        self.event: EventSpec | None = None
        self.buffer: ReplayBuffer | None = None

    @classmethod
    @usual_tensors()
    def from_config(cls, config: TrainConfig, event: EventSpec) -> CoopFlow:
        """Untrained models, with weights drawn from the settings' seed.

        They come from torch's generator, which no other thread may draw from meanwhile.
        """
        with seeded(Key(config.seed).fold_in(USE_INIT).seed):
            flow = build_flow(config, event)
            energy = build_energy(config, event)
        model = cls(flow, energy, build_sampler(config, energy, event, training=False))
        model.config, model.event = config, event
        if config.start == "buffer":
            model.buffer = build_buffer(config, event)
        return model

    @classmethod
    @usual_tensors()
    def from_official(
        cls,
        path_or_dict: str | Path | Mapping[str, Any],
        image_shape: Sequence[int] = (3, 32, 32),
        *,
        preset: str = "cifar10",
        legacy_contrast: bool = True,
        legacy_cdf_clamp: bool = True,
        dropout: float = 0.2,
    ) -> CoopFlow:
        """The models of a checkpoint of the authors' published code, ready to :meth:`save`.

        Args:
            path_or_dict, image_shape, legacy_contrast, legacy_cdf_clamp, dropout: as for
                :func:`coopflow_ext.coop.load_official`.
            preset: where the settings of the chain, and the name of the data, come from.

        Raises:
            ValueError: the checkpoint does not fit, or lacks one of the two models.
        """
        nets = read_official(path_or_dict)
        options: dict[str, Any] = {
            "legacy_contrast": legacy_contrast,
            "legacy_cdf_clamp": legacy_cdf_clamp,
            "dropout": dropout,
        }
        flow, energy = load_official(nets, image_shape, **options)
        if flow is None or energy is None:
            raise ValueError(
                "a CoopFlow needs both flow_net and ebm_net in the checkpoint, which holds only "
                f"{', '.join(nets)}; load_official returns the model of one"
            )
        config = TrainConfig.from_dict(
            {
                "preset": preset,
                "flow": "flowpp",
                "flow_options": {**infer_flow_options(nets["flow_net"], image_shape), **options},
                "energy": "res",
                "energy_options": {"width": energy.width},
            }
        )
        event = EventSpec(tuple(image_shape), 256)
        model = cls(flow, energy, build_sampler(config, energy, event, training=False))
        model.config, model.event = config, event
        return model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CoopFlow:
        """What ``to`` does to the weights, also for the persistent chains."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.buffer is not None:
            self.buffer.states = fn(self.buffer.states)
        return self

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode inside, the mode of each model as it was afterwards."""
        return in_mode(self, training=False)

    def propose(self, n: int, key: Key | None = None) -> Tensor:
        """The starts of n chains, (n, *event_shape): flow samples, noise, or persistent chains."""
        like = next(self.parameters())
        if self.config is None or self.event is None:
            return self.flow.sample(n, key)
        if self.config.start == "flow":
            with in_precision(self.config.flow_precision, like.device.type):
                return self.flow.sample(n, key)
        rng = stream(key, USE_CHAIN, device=like.device, batch=n)
        if self.buffer is not None:
            u = ops.uniform((n, 1), rng, dtype=torch.float64)
            states: Tensor = self.buffer.states
            return states[(u[:, 0] * self.buffer.size).long()]
        u = ops.uniform((n, *self.event.shape), rng, dtype=like.dtype)
        low, high = self.event.range
        return low + (high - low) * u

    def refine(self, x0: Tensor, key: Key | None = None) -> Tensor:
        """The states of the Langevin chains that start at x0 (B, *event_shape).

        Of a model made from settings it is these that say the precision, whatever autocast the
        caller is in, as of :meth:`propose`.
        """
        precision: AbstractContextManager[Any] = nullcontext()
        if self.config is not None:  # the sampler enters autocast to bfloat16 itself
            precision = full_precision(next(self.parameters()).device.type)
        with precision:
            x = self.sampler(x0, key=key).x
        assert isinstance(x, Tensor)
        return x

    def sample_pairs(
        self, n: int, key: Key | None = None, *, batch_size: int = 500
    ) -> tuple[Tensor, Tensor]:
        """n flow proposals and the Langevin results that they lead to, each (n, *event_shape).

        Made in batches of ``batch_size``, which changes nothing beyond the rounding of the
        networks.
        """
        check_counts(1, n=n, batch_size=batch_size)
        key = Key.or_default(key)
        key.check_batch(n)
        proposals, results = [], []
        with self.evaluating():
            for start in range(0, n, batch_size):
                size = min(batch_size, n - start)
                part = key.at_chain(key.chain + start)
                proposals.append(self.propose(size, part))
                results.append(self.refine(proposals[-1], part))
        return torch.cat(proposals), torch.cat(results)

    def sample(self, n: int, key: Key | None = None, *, batch_size: int = 500) -> Tensor:
        """n samples: flow proposals refined by the chain, (n, *event_shape)."""
        return self.sample_pairs(n, key, batch_size=batch_size)[1]

    def save(self, path: str | Path) -> None:
        """Write weights and settings to one safetensors file, which :meth:`load` reads.

        Raises:
            ValueError: the models were not built from settings, so a file could not rebuild them;
                save ``state_dict()`` instead.
        """
        if self.config is None or self.event is None:
            raise ValueError(
                "save needs a model made by CoopFlow.from_config or CoopFlow.load; "
                "save state_dict() of models of your own"
            )
        save_checkpoint(Path(path), {**self.state_dict(), **self.buffer_tensors()}, self.metadata())

    def metadata(self) -> dict[str, Any]:
        """What a file must hold beside the weights so that the models can be rebuilt."""
        assert self.config is not None
        assert self.event is not None
        return {"config": self.config.to_json(), "event": asdict(self.event)}

    def buffer_tensors(self) -> dict[str, Tensor]:
        """The persistent chains and how often they were drawn from; empty without them."""
        if self.buffer is None:
            return {}
        state = self.buffer.state_dict()
        return {
            "buffer.states": state["states"],
            "buffer.draws": torch.tensor(state["time"]),
        }

    def read_buffer(self, contents: Contents) -> dict[str, Any]:
        """What :meth:`buffer_tensors` gave, from a checkpoint; nothing changes here.

        Raises:
            RunError: a tensor is missing or does not fit; names it.
        """
        if self.buffer is None:
            return {}
        states = contents.take("buffer.states", self.buffer.states)
        draws = contents.take_count("buffer.draws")
        if draws >= TIME_LIMIT:
            raise RunError(f"buffer.draws must be < {TIME_LIMIT}, got {draws}")
        return {**self.buffer.key.state_dict(), "states": states, "time": draws}

    def load_buffer(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`read_buffer` gave."""
        if self.buffer is not None:
            self.buffer.load_state_dict(state)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> CoopFlow:
        """Rebuild the models from a file of :meth:`save`, a checkpoint, or a run folder.

        Of a run the averaged weights are taken where it keeps them.

        Raises:
            RunError: the file or folder is missing, damaged or of another format.
        """
        path = Path(path)
        if path.is_dir():
            TrainConfig.of_run(path)  # RunError unless it is a run
            path, (tensors, metadata) = load_latest(path)
        else:
            tensors, metadata = load_checkpoint(path)
        with naming(path):
            return cls.from_checkpoint(tensors, metadata).to(device)

    @classmethod
    @usual_tensors()
    def from_checkpoint(cls, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> CoopFlow:
        """The models of what a checkpoint holds, in the dtype that it has.

        Raises:
            RunError: something is missing or does not fit; names it.
        """
        model = cls._from_metadata(metadata)
        model._load(Contents(tensors))
        return model

    @classmethod
    def _from_metadata(cls, metadata: dict[str, Any]) -> CoopFlow:
        """The untrained models that :meth:`metadata` speaks of; RunError where it does not."""
        try:
            config = TrainConfig.from_json(metadata["config"])
            return cls.from_config(config, EventSpec.from_dict(metadata["event"]))
        except KeyError as error:
            raise RunError(f"its metadata has no {error}") from error
        except (ValueError, TypeError) as error:
            raise RunError(str(error)) from error

    def _load(self, contents: Contents) -> None:
        """Take over the weights of a checkpoint: the averaged ones where it has them."""
        dtype = contents.dtype_of("flow", self.flow)
        if dtype.is_floating_point:
            self.to(dtype)
        for name, module in (("flow", self.flow), ("energy", self.energy)):
            state = contents.take_state(name, module)
            if any(f"{name}_ema.{n}" in contents for n, _ in module.named_parameters()):
                state.update(contents.take_averages(f"{name}_ema", module))
            module.load_state_dict(state)
        self.load_buffer(self.read_buffer(contents))
