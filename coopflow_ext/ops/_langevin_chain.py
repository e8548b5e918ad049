"""What the faces of whole chains share: their call and the shapes of their results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from coopflow_ext._checks import check_count
from coopflow_ext.ops import _call
from coopflow_ext.ops.langevin import raw_options, refuse_derivatives, refuse_tangent

_COLUMNS = 6  # of the statistics
_MALA_COLUMNS = 5
KIND = "a whole chain"
"""What the ops are, for messages."""


class ChainResult(NamedTuple):
    """What an op of whole chains returns.

    Attributes:
        x: the last state, like x0.
        trajectory: (n_steps // thin, *x0.shape), the states after steps thin, 2·thin, …; or None.
        stats: (n_steps, B, 6): the five of :func:`langevin_step_` and the energy where the gradient
            was taken; or None.
        frozen_at: (B,) int64, the number of the step at which a chain stopped; ``step + n_steps``
            where it did not.
    """

    x: Tensor
    trajectory: Tensor | None
    stats: Tensor | None
    frozen_at: Tensor


class MALAResult(NamedTuple):
    """What an op of whole chains that accept their moves returns.

    Attributes:
        x: the last state, like x0.
        trajectory: (n_steps // thin, *x0.shape), the states after steps thin, 2·thin, …; or None.
        stats: (n_steps, B, 5): U and Σ(∇U)² of the state after the step, the probability with which
            the proposal was accepted, whether it was (0 or 1), and its step size; or None.
        step_size: (B,), δ of each chain in the last step, after its adaptation.
        finite: (B,) bool, whether U and ∇U are finite at x0.
    """

    x: Tensor
    trajectory: Tensor | None
    stats: Tensor | None
    step_size: Tensor
    finite: Tensor


def run_chain(op: str, x0: Tensor, *energy: Any, **options: Any) -> ChainResult:
    """Calls the raw op of this name with what describes its energy, and a chain's options."""
    return ChainResult(*_run(op, x0, *energy, **options))


def run_mala_chain(op: str, x0: Tensor, *energy: Any, **options: Any) -> MALAResult:
    """The same of an op whose chains accept their moves."""
    return MALAResult(*_run(op, x0, *energy, **options))


def _run(
    op: str, x0: Tensor, *energy: Any, thin: int | None, stats: bool, **options: Any
) -> tuple[Any, ...]:
    """(x, trajectory or None, statistics or None, …)."""
    if thin is not None:  # for no trajectory
        check_count(f"{op}: thin", thin, 1)
    raw = raw_options(op, thin=thin, stats=stats, **options)
    refuse_derivatives(op, KIND, x0=x0, **raw)
    if _call.in_forward_mode():
        for value in energy:
            for tensor in value if isinstance(value, list) else (value,):
                refuse_tangent(f"{op}: a tensor of the energy", tensor, KIND)
    try:
        # Parameters of the energy may want gradients, and get none.
        x, trajectory, sums, *others = _call.compute(op, x0, *energy, **raw)
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    return x, None if thin is None else trajectory, sums if stats else None, *others


def fake_results(
    x0: Tensor, *energy: Any, n_steps: int, thin: int = 0, stats: bool = False, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results' shapes. What is not wanted has no rows."""
    recorded = _fake_records(x0, n_steps, thin, stats, _COLUMNS)
    return torch.empty_like(x0), *recorded, x0.new_empty(x0.shape[0], dtype=torch.int64)


def fake_mala_results(
    x0: Tensor, *energy: Any, n_steps: int, thin: int = 0, stats: bool = False, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    recorded = _fake_records(x0, n_steps, thin, stats, _MALA_COLUMNS)
    batch = x0.shape[0]
    return (
        torch.empty_like(x0),
        *recorded,
        x0.new_empty(batch),
        x0.new_empty(batch, dtype=torch.bool),
    )


def _fake_records(
    x0: Tensor, n_steps: int, thin: int, stats: bool, columns: int
) -> tuple[Tensor, Tensor]:
    """A trajectory and statistics."""
    return (
        x0.new_empty(n_steps // thin if thin else 0, *x0.shape),
        x0.new_empty(n_steps if stats else 0, x0.shape[0], columns),
    )
