"""Our flow layers as zuko transforms: ``zuko.flows.Flow([ZukoTransform(coupling), …], base)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform as DistributionTransform
from torch.distributions import constraints

from coopflow_ext._optional import require
from coopflow_ext.flows.base import Context, Transform, check_transform

__all__ = ["ZukoTransform"]

_lazy = require("zuko.lazy", extra="test", distribution="zuko")


class ZukoTransform(_lazy.LazyTransform):  # type: ignore[misc, name-defined]
    """Data → latent is "forward", as in zuko; zuko's context becomes ours.

    Args:
        transform: a layer of :mod:`coopflow_ext.flows`, its parameters trained as usual.
        event_dim: dimensions of one x: 1 for vectors, 3 for images.
    """

    def __init__(self, transform: Transform, event_dim: int = 1) -> None:
        super().__init__()
        self.transform = check_transform(transform)
        self.event_dim = event_dim

    def forward(self, c: Tensor | None = None) -> DistributionTransform:
        return _Bound(self.transform, self.event_dim, c)


class _Bound(DistributionTransform):
    """A transform given its context, for any number of batch dimensions."""

    bijective = True

    def __init__(self, transform: Transform, event_dim: int, context: Tensor | None) -> None:
        super().__init__()
        self.transform, self.context = transform, context
        self.domain = self.codomain = constraints.independent(constraints.real, event_dim)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(self.transform.call_and_ladj, x)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._run(self.transform.inverse_and_ladj, y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def _run(self, function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        split = x.ndim - self.domain.event_dim
        batch, event = x.shape[:split], x.shape[split:]
        aux = self.context
        if aux is not None:  # zuko broadcasts x and context against each other
            batch = torch.broadcast_shapes(batch, aux.shape[:-1])
            x = x.expand(*batch, *event)
            aux = aux.expand(*batch, *aux.shape[-1:]).reshape(-1, *aux.shape[-1:])
        y, ladj = function(x.reshape(-1, *event), Context(aux=aux))
        return torch.reshape(y, x.shape), torch.reshape(ladj, batch)
