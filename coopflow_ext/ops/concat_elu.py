"""ELU of x and of −x, with dropout of whole channels by a key."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from coopflow_ext import reference
from coopflow_ext._tensors import check_tensors
from coopflow_ext.ops import _call


def concat_elu(x: Tensor, rng: Tensor | None = None, p: float = 0.0, *, step: int = 0) -> Tensor:
    """ELU of x and of −x, twice the channels, with dropout of whole channels by a key.

    The graph keeps the result alone, which a layer behind it keeps anyway: the derivative is taken
    from it, and the mask is drawn anew. Second derivatives are the reference's.

    Equivalent to::

        y = F.elu(torch.cat((x, -x), dim=1))
        if rng is not None and p > 0:
            kept = ops.uniform((B, 2 * C), rng, step=step) >= p  # and as many dimensions as y
            y = y * kept / (1 - p)

    Args:
        x: (B, C, …), floating. What is neither contiguous nor in channels_last is copied first.
        rng: (seed, time, chain), as ``Key.tensor`` gives it; dimension 0 counts the chains. None:
            nothing is dropped.
        p: probability that a channel of an image is dropped, 0 ≤ p < 1.
        step: added to the key's time.

    Returns:
        (B, 2C, …) of x's dtype, computed in float32 (float64 for double), in channels_last if x is
        and else contiguous.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    check_tensors(x=x)
    if rng is not None:
        check_tensors(rng=rng)
    if torch.compiler.is_compiling():
        # Dynamo does not see that an argument of func.grad requires grad; of a view it does.
        x = x.view_as(x)
    try:
        y: Tensor = _call.apply(_CONCAT_ELU, x, rng, p, step)
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    return y


class ConcatElu(torch.autograd.Function):
    """(x, rng, p, step) -> y."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        result: Tensor = _call.compute("concat_elu", *inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rng, *ctx.options = inputs
        ctx.save_for_backward(output, rng)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = _call.apply(_CONCAT_ELU_BACKWARD, grad_y, *ctx.saved_tensors, *ctx.options)
        return (grad_x, None, None, None)


class ConcatEluBackward(torch.autograd.Function):
    """(grad_y, y, rng, p, step) -> gradient of x."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        result: Tensor = _call.compute("concat_elu_backward", *inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_y, y, rng, *ctx.options = inputs
        ctx.save_for_backward(grad_y, y, rng)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, y, rng = ctx.saved_tensors
        p, step = ctx.options

        def gradient(grad_y: Tensor, y: Tensor) -> Tensor:
            return reference.concat_elu_gradient(grad_y, y, rng, p, step=step)

        return (*_call.pull_back(gradient, grad_y, y)(grad), None, None, None)


def _is_channels_last(x: Tensor) -> bool:
    """As csrc/ops/concat_elu_op.h decides."""
    several = x.numel() > 0 and math.prod(x.shape[2:]) > 1
    return several and x.stride(1) == 1 and x.movedim(1, -1).is_contiguous()


def _laid_out_as(x: Tensor, channels: int) -> Tensor:
    """A new tensor with another number of channels."""
    batch, _, *sizes = x.shape
    if _is_channels_last(x):
        return x.new_empty(batch, *sizes, channels).movedim(-1, 1)
    return x.new_empty(batch, channels, *sizes)


def _shapes(x: Tensor, *others: Any, **options: Any) -> Tensor:
    return _laid_out_as(x, 2 * x.shape[1])


def _backward_shapes(grad_y: Tensor, y: Tensor, *others: Any, **options: Any) -> Tensor:
    return _laid_out_as(y, y.shape[1] // 2)


_call.register_autograd("concat_elu", ConcatElu)
_call.register_fake("concat_elu", _shapes)
_CONCAT_ELU = _call.positional("concat_elu", ConcatElu)
_call.register_autograd("concat_elu_backward", ConcatEluBackward)
_call.register_fake("concat_elu_backward", _backward_shapes)
_CONCAT_ELU_BACKWARD = _call.positional("concat_elu_backward", ConcatEluBackward)
