"""What every sampler does at a call, before its loop."""

from __future__ import annotations

import torch
from torch import Tensor

from coopflow_ext.errors import NonFiniteError
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


def nonfinite_error(
    active: Tensor, frozen_at: Tensor, xs: Tensors, *, what: str = "the gradient", advice: str
) -> NonFiniteError:
    """The error for the chains that stopped at steps ``frozen_at``, and end in ``xs``."""
    last = tuple(x.detach().clone() for x in xs)
    chains = (~active).nonzero().flatten().cpu()
    step = int(frozen_at.min())
    shown = ", ".join(map(str, chains[:8].tolist())) + (", …" if len(chains) > 8 else "")
    return NonFiniteError(
        f"{what} was not finite in {len(chains)} of {len(active)} chains ({shown}), first at "
        f"step {step}; {advice}",
        step=step,
        chains=chains,
        x=last[0] if len(last) == 1 else last,
    )


def normals_like(x: Tensor, xi: State | None, n_steps: int) -> Tensors | None:
    """The supplied normals of each step in x's dtype and layout."""
    if xi is None:
        return None
    (given,) = check_like("xi", xi, (x,), lead=(n_steps,))
    return tuple(torch.empty_like(x).copy_(row) for row in given.unbind(0))
