"""The weights of many weight-normed layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coopflow_ext import reference
from coopflow_ext._checks import check_sequence
from coopflow_ext._tensors import check_tensors
from coopflow_ext.ops import _call

Tensors = tuple[Tensor, ...]


def weight_norm(directions: Sequence[Tensor], gains: Sequence[Tensor]) -> Tensors:
    """w = g·v/‖v‖ for every row of each layer, by one operator for all layers.

    On CUDA that is a launch for some 60 layers. Sums are in float32 (float64 for double) and in a
    fixed order. Second derivatives are the reference's.

    Equivalent to, but for rounding::

        tuple(torch._weight_norm(v, g, 0) for v, g in zip(directions, gains))

    Args:
        directions: v of each layer, (rows, …), all of one floating dtype and on one device.
        gains: g of each, (rows, 1, …) with as many dimensions as v, of v's dtype.

    Returns:
        w of each layer, of v's shape and dtype, contiguous. A row of zeros becomes NaN.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    _check_list("directions", directions)
    _check_list("gains", gains)
    if len(directions) != len(gains):
        raise ValueError(
            f"weight_norm: gains must be as many as the directions, {len(directions)}, "
            f"got {len(gains)}"
        )
    if not directions:
        return ()
    try:
        tensors = [tensor.contiguous() for tensor in (*directions, *gains)]
        if torch.compiler.is_compiling():  # which wants no tensor twice, as a gain that is shared
            tensors = [tensor.view_as(tensor) for tensor in tensors]
        weights: Tensors = _call.apply(WeightNorm, *tensors)
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    return weights


def _check_list(name: str, values: Sequence[Tensor]) -> None:
    """TypeError unless it is a sequence of tensors."""
    check_sequence(f"weight_norm: {name}", values, "tensors")
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            check_tensors(**{f"{name}[{i}]": value})


def _parts(tensors: Sequence[Any], count: int) -> list[list[Any]]:
    """As many lists of equal length, of what they are when joined."""
    length = len(tensors) // count
    return [list(tensors[i * length : (i + 1) * length]) for i in range(count)]


def _without_context(arguments: Sequence[Any]) -> Sequence[Any]:
    """torch.compile hands a context over, too, to a forward of any number of arguments: it tells
    by their number whether there is to be one."""
    return arguments[1:] if not isinstance(arguments[0], Tensor) else arguments


class WeightNorm(torch.autograd.Function):
    """(*directions, *gains) -> weights."""

    @staticmethod
    def forward(*tensors: Tensor) -> Tensors:
        return tuple(_call.compute("weight_norm", *_parts(_without_context(tensors), 2)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Tensors, output: Tensors) -> None:
        _call.leave_unused(ctx)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """None for layers whose weights nobody used."""
        directions, gains = _parts(ctx.saved_tensors, 2)
        used = [i for i, grad in enumerate(grads) if grad is not None]
        found: list[Tensor | None] = [None] * (2 * len(grads))
        if used:
            results = _call.apply(
                WeightNormBackward,
                *(grad.contiguous() for grad in grads if grad is not None),
                *(directions[i] for i in used),
                *(gains[i] for i in used),
            )
            for i, grad_direction, grad_gain in zip(used, *_parts(results, 2), strict=True):
                found[i], found[len(grads) + i] = grad_direction, grad_gain
        return tuple(found)


class WeightNormBackward(torch.autograd.Function):
    """(*grads, *directions, *gains) -> gradients of the directions and of the gains."""

    @staticmethod
    def forward(*tensors: Tensor) -> Tensors:
        lists = _parts(_without_context(tensors), 3)
        grad_directions, grad_gains = _call.compute("weight_norm_backward", *lists)
        return (*grad_directions, *grad_gains)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tensors, output: Tensors) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensors:
        def weights(*tensors: Tensor) -> Tensors:
            return reference.weight_norm(*_parts(tensors, 2))

        def gradients(*tensors: Tensor) -> Tensors:
            cotangents, directions, gains = _parts(tensors, 3)
            found: Tensors = _call.pull_back(weights, *directions, *gains)(tuple(cotangents))
            return found

        found: Tensors = _call.pull_back(gradients, *ctx.saved_tensors)(grads)
        return found


def _register(name: str, function: type[torch.autograd.Function], results: int) -> None:
    """As :func:`_call.register_autograd`, for an op whose arguments and results are lists."""

    def joined(lists: Any) -> Tensors:
        return tuple(tensor for tensors in lists for tensor in tensors)

    class Lists(function):  # type: ignore[misc, valid-type]
        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.lists = len(inputs)
            flat = joined(output if results > 1 else [output])
            function.setup_context(ctx, joined(inputs), flat)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found = function.backward(ctx, *joined(grads))
            return tuple(_parts(found, ctx.lists))

    _call.register_autograd(name, Lists)


def _shapes(directions: list[Tensor], gains: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(v) for v in directions]


def _backward_shapes(
    grads: list[Tensor], directions: list[Tensor], gains: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(v) for v in directions], [torch.empty_like(g) for g in gains]


_register("weight_norm", WeightNorm, results=1)
_call.register_fake("weight_norm", _shapes)
_register("weight_norm_backward", WeightNormBackward, results=2)
_call.register_fake("weight_norm_backward", _backward_shapes)
