"""Temporary: the ops in plain PyTorch, replaced by the compiled ones in the next commits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coopflow_ext.reference import (
    affine_coupling,
    affine_coupling_inverse,
    langevin_noise,
    langevin_step,
    normal,
    uniform,
)

__all__ = [
    "affine_coupling",
    "affine_coupling_inverse",
    "langevin_noise_",
    "langevin_step",
    "langevin_step_",
    "normal",
    "uniform",
]


def langevin_step_(
    x: Tensor,
    grad: Tensor,
    rng: Tensor,
    *,
    x_low: Tensor | None = None,
    stats: Tensor | None = None,
    active: Tensor | None = None,
    freeze_nonfinite: bool = False,
    **kwargs: Any,
) -> Tensor:
    with torch.no_grad():
        out = langevin_step(x, grad, rng, **kwargs)
        if stats is not None:
            stats[:, 0] = grad.flatten(1).square().sum(1)
            stats[:, 1] = (out - x).flatten(1).square().sum(1)
            stats[:, 4] = (~grad.isfinite()).flatten(1).sum(1)
        if active is not None:
            if freeze_nonfinite:
                active &= grad.flatten(1).isfinite().all(1)
            out = torch.where(active.reshape(-1, *[1] * (x.dim() - 1)), out, x)
        x.copy_(out)
        if x_low is not None:
            x_low.copy_(out)
    return x


def langevin_noise_(
    x: Tensor, rng: Tensor, *, active: Tensor | None = None, **kwargs: Any
) -> Tensor:
    with torch.no_grad():
        return x.copy_(langevin_noise(x, rng, **kwargs))
