"""Random numbers as a pure function of a key, a step, a chain and an element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coopflow_ext._checks import check_sequence
from coopflow_ext._export import is_exporting
from coopflow_ext.ops import _call


def normal(
    shape: Sequence[int],
    rng: Tensor,
    *,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals of the given shape on rng's device; dimension 0 counts the chains.

    A pure function of (seed, chain, time + step, element): the words are the same on every device
    and for every dtype; elements are counted in storage order within a chain.

    Equivalent to :func:`coopflow_ext.reference.normal`.
    """
    return _drawn("normal", shape, rng, step, dtype)


def uniform(
    shape: Sequence[int],
    rng: Tensor,
    *,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniforms in the open interval (0, 1) from the words behind :func:`normal`.

    float64 uses all 32 bits of a word; float32 and below its top 23 (half-precision dtypes round
    the float32 value, which can give 0 or 1 exactly).

    Equivalent to :func:`coopflow_ext.reference.uniform`.
    """
    return _drawn("uniform", shape, rng, step, dtype)


def _drawn(op: str, shape: Sequence[int], rng: Tensor, step: int, dtype: torch.dtype) -> Tensor:
    # An exported program runs where the operators of this package's Python code are not.
    if torch.compiler.is_compiling() and not is_exporting():
        drawn: Tensor = _traced_draw(op, list(shape), rng, step, dtype)
        return drawn
    return _draw(op, shape, rng, step, dtype)


def _draw(op: str, shape: Sequence[int], rng: Tensor, step: int, dtype: torch.dtype) -> Tensor:
    out = _new(op, shape, rng, dtype)
    try:
        getattr(_call.coopflow, f"{op}_")(out, rng, step=step)
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    return out


@torch.library.custom_op(
    "coopflow_ext::draw",
    mutates_args=(),
    schema="(str op, SymInt[] shape, Tensor rng, SymInt step, ScalarType dtype) -> Tensor",
)
def _traced_draw(
    op: str, shape: Sequence[int], rng: Tensor, step: int, dtype: torch.dtype
) -> Tensor:
    """A draw that mutates nothing, for torch.compile: it moved the filling of a new tensor behind
    the tensor's uses (seen in 2.13, in a graph with gradients)."""
    return _draw(op, shape, rng, step, dtype)


@_traced_draw.register_fake
def _(op: str, shape: Sequence[int], rng: Tensor, step: int, dtype: torch.dtype) -> Tensor:
    return _new(op, shape, rng, dtype)


def _new(op: str, shape: Sequence[int], rng: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(rng, Tensor):
        raise TypeError(f"{op}: rng must be a tensor (see Key.tensor), got {type(rng).__name__}")
    check_sequence(f"{op}: shape", shape, "ints")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype must be a torch.dtype, got {type(dtype).__name__} {dtype!r}")
    if any(n < 0 for n in shape):
        raise ValueError(f"{op}: shape must not hold negative sizes, got {tuple(shape)}")
    try:
        return torch.empty(tuple(shape), dtype=dtype, device=rng.device)
    except TypeError as error:
        raise TypeError(f"{op}: shape must be a sequence of ints, got {tuple(shape)}") from error


_call.register_fake("normal_", _call.no_result)
_call.register_fake("uniform_", _call.no_result)
