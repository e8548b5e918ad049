"""torchebm's base class of samplers; where torchebm is missing, what is used of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from coopflow_ext._optional import optional

__all__ = [
    "BaseSampler",
    "ConstantScheduler",
    "EulerMaruyamaIntegrator",
    "Schedulable",
    "Scheduler",
    "resolve_integrator",
]


@runtime_checkable
class Scheduler(Protocol):
    """What is used of torchebm's ``BaseScheduler``."""

    def get_value(self) -> float: ...
    def step(self) -> float: ...
    def reset(self) -> None: ...


class _Constant:
    def __init__(self, start_value: float) -> None:
        self.start_value = start_value

    def get_value(self) -> float:
        return self.start_value

    def step(self) -> float:
        return self.start_value

    def reset(self) -> None:
        pass


class _Sampler(nn.Module):
    """Schedulers by name; device and dtype those of the parameters or, without any, as given."""

    _probe: torch.Tensor

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.schedulers: dict[str, Scheduler] = {}
        probe = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("_probe", probe, persistent=False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), self._probe).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters(), self._probe).dtype

    def register_scheduler(self, name: str, scheduler: Scheduler) -> None:
        self.schedulers[name] = scheduler

    def get_schedulers(self) -> dict[str, Scheduler]:
        return self.schedulers

    def get_scheduled_value(self, name: str) -> float:
        return self.schedulers[name].get_value()

    def step_schedulers(self) -> None:
        for scheduler in self.schedulers.values():
            scheduler.step()

    def reset_schedulers(self) -> None:
        for scheduler in self.schedulers.values():
            scheduler.reset()

    def autocast_context(self) -> AbstractContextManager[Any]:
        return nullcontext()


class _EulerMaruyama:
    pass


def _resolve(integrator: object, **_: object) -> object:
    return _EulerMaruyama() if integrator in (None, "euler_maruyama", "euler") else integrator


BaseSampler: Any = _Sampler
Schedulable: Any = _Sampler
ConstantScheduler: Any = _Constant
EulerMaruyamaIntegrator: Any = _EulerMaruyama
resolve_integrator: Callable[..., object] = _resolve

if (_core := optional("torchebm.core")) is not None:
    _integrators = optional("torchebm.integrators")
    BaseSampler, Schedulable = _core.BaseSampler, _core.Schedulable
    ConstantScheduler = _core.ConstantScheduler
    EulerMaruyamaIntegrator = _integrators.EulerMaruyamaIntegrator
    resolve_integrator = partial(
        _integrators.resolve_integrator,
        default="euler_maruyama",
        family=_core.BaseSDERungeKuttaIntegrator,
    )
