"""The tensors that a chain owns, made from the arguments of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from coopflow_ext.rng import Key
from coopflow_ext.samplers.checks import check_like
from coopflow_ext.samplers.output import State, Tensors


def state_copy(x: Tensor, *, channels_last: bool = False) -> Tensor:
    """A copy that a chain may overwrite: dense, with the batch as outermost dimension."""
    if channels_last and x.ndim != 4:
        raise ValueError(f"channels_last needs x0 of shape (B, C, H, W), got {tuple(x.shape)}")
    if channels_last or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.detach().clone(memory_format=torch.channels_last)
    return x.detach().clone(memory_format=torch.contiguous_format)


def rng_tensors(key: Key, xs: Tensors) -> Tensors:
    """Tensor 0 of a state uses the key's seed, tensor j folds in j."""
    return tuple((key.fold_in(j) if j else key).tensor(x.device) for j, x in enumerate(xs))


def normals_like(x: Tensor, xi: State | None, n_steps: int) -> Tensors | None:
    """The supplied normals of each step in x's dtype and layout."""
    if xi is None:
        return None
    (given,) = check_like("xi", xi, (x,), lead=(n_steps,))
    return tuple(torch.empty_like(x).copy_(row) for row in given.unbind(0))
