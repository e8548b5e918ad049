"""The tensors that a chain owns, made from the arguments of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from coopflow_ext.rng import Key, stream
from coopflow_ext.samplers.checks import check_like
from coopflow_ext.samplers.output import State, Tensors


def state_copy(x: Tensor, *, channels_last: bool = False) -> Tensor:
    """A copy that a chain may overwrite: dense, with the batch as outermost dimension."""
    if channels_last and x.ndim != 4:
        raise ValueError(f"channels_last needs x0 of shape (B, C, H, W), got {tuple(x.shape)}")
    if channels_last or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.detach().clone(memory_format=torch.channels_last)
    return x.detach().clone(memory_format=torch.contiguous_format)


def rng_tensors(key: Key, xs: Tensors, *uses: int) -> Tensors:
    """Tensor 0 of a state uses the key's seed, or what ``uses`` make of it; tensor j folds in j."""
    first = stream(key, *uses, device=xs[0].device)
    others = (stream(key, *uses, j, device=x.device) for j, x in enumerate(xs[1:], 1))
    return (first, *others)


def step_rows(x: Tensor, n_steps: int) -> Tensor:
    """Uninitialised (T, *x.shape), each row of which lies in memory as x does."""
    strides = (x.numel(), *x.stride())
    return torch.empty_strided((n_steps, *x.shape), strides, dtype=x.dtype, device=x.device)


def first_rows(values: Tensor, n_steps: int) -> Tensor:
    """A copy of the first n_steps rows, the last of them again where there are fewer."""
    rows = torch.arange(n_steps, device=values.device).clamp(max=len(values) - 1)
    return values.detach().index_select(0, rows)


def normals_like(
    xi: State | None, xs: Tensors, n_steps: int, without: int = 0, *, keeps_graph: bool = False
) -> Tensors | None:
    """The supplied normals of each tensor, (T, *x.shape), in its dtype and layout, and zeros for so
    many steps ``without``. ``keeps_graph``: for a differentiable step, which refuses what requires
    grad by name."""
    if xi is None:
        return None
    values = check_like("xi", xi, xs, lead=(n_steps,))
    rows = tuple(step_rows(x, n_steps + without) for x in xs)
    for row, value in zip(rows, values, strict=True):
        row[:n_steps].copy_(value if keeps_graph else value.detach())
        row[n_steps:].zero_()
    return rows
