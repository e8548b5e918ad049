"""What a sampler returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coopflow_ext._tensors import room_for
from coopflow_ext.errors import NonFiniteError
from coopflow_ext.rng import Key

State = Tensor | list[Tensor] | tuple[Tensor, ...]
"""One tensor (B, …), or several with the same B: what a chain moves."""

Tensors = tuple[Tensor, ...]
"""The tensors of a state."""


def pack(xs: Sequence[Tensor], like: State) -> State:
    """Tensors in the structure (tensor, list or tuple) of ``like``."""
    if isinstance(like, Tensor):
        return xs[0]
    return list(xs) if isinstance(like, list) else tuple(xs)


def unpack(state: State) -> Tensors:
    """The inverse of :func:`pack`."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


@dataclass(frozen=True)
class ChainStatistics:
    """Per step and per chain, each (T, B), on the state's device; ``denoise`` is a step more.

    float32 (float64 for a double state). For a state of several tensors, norms and fractions are
    over all of them.

    Attributes:
        energy: U where the gradient was taken; None with ``score=``.
        grad_norm: L2 norm of the gradient before any clip.
        displacement: L2 norm of the step; noise counts where it is part of the step, not where it
            comes before the gradient.
        clip_fraction: share of the elements changed by ``grad_clip`` or ``step_clip``.
        clamp_fraction: share of the elements changed by ``clamp`` after the step.
        nonfinite: number of elements of the gradient that are not finite.
    """

    energy: Tensor | None
    grad_norm: Tensor
    displacement: Tensor
    clip_fraction: Tensor
    clamp_fraction: Tensor
    nonfinite: Tensor


def chain_statistics(sums: Tensor, energy: Tensor | None, *, n_elements: int) -> ChainStatistics:
    """The sums (T, B, 5 or more) of ``ops.langevin_step_`` as norms and fractions of the elements
    of a chain."""
    n_elements = max(n_elements, 1)
    return ChainStatistics(
        energy=energy,
        grad_norm=sums[..., 0].sqrt(),
        displacement=sums[..., 1].sqrt(),
        clip_fraction=sums[..., 2] / n_elements,
        clamp_fraction=sums[..., 3] / n_elements,
        nonfinite=sums[..., 4].to(torch.int64),
    )


class _Output(NamedTuple):
    x: Any  # a State, of x0's structure
    key: Key
    trajectory: Any  # likewise, or None
    stats: ChainStatistics | None


class SamplerOutput(_Output):
    """Result of a chain: (x, key, trajectory, stats), and beside these ``frozen_at``.

    Attributes:
        x: the last state, shape, dtype and structure of x0.
        key: the key advanced by the number of steps: pass it to continue the same path (of steps
            that are alike: schedules and momentum begin anew).
        trajectory: (T // thin, *x.shape), the states after steps thin, 2·thin, …, with x0 before
            them where ``include_start`` asks for it; or None. ``denoise`` is a step more.
        stats: :class:`ChainStatistics` with ``stats=True``, else None.
        frozen_at: int64 (B,) with ``on_nonfinite="freeze"``, else None: the step at which a chain
            stopped, T where it did not.
    """

    frozen_at: Tensor | None = None


def new_states(x: Tensor, n: int) -> Tensor:
    """Memory for n states like x, (n, *x.shape)."""
    with room_for("the trajectory", (n, *x.shape), x.dtype):
        return x.new_empty(n, *x.shape)


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
