"""LayerNorm of a residual sum whose new part is gated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coopflow_ext import reference
from coopflow_ext._tensors import arithmetic_dtype, check_tensors
from coopflow_ext.ops import _call

Gradients = tuple[Tensor, Tensor, Tensor]


def gate_add_norm(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over the last dimension of x + a·σ(b), where gates = (a, b).

    What closes each layer of a Flow++ conditioner (Ho et al. 2019), in one pass. The graph keeps x
    and the gates, and two numbers a row; sums are in float32 (float64 for double) and in a fixed
    order. Weight and bias may have their own dtype, so that half-precision activations meet float32
    parameters. Second derivatives are the reference's.

    Equivalent to::

        return F.layer_norm(x + F.glu(gates, -1), (C,), weight, bias, eps)

    Args:
        x: (..., C), floating. What is not contiguous is copied first.
        gates: (..., 2C) of x's dtype, the values a and behind them the gates b.
        weight, bias: (C,), floating.
        eps: added to the variance, ≥ 0.

    Returns:
        (..., C) of x's dtype, contiguous.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    check_tensors(x=x, gates=gates, weight=weight, bias=bias)
    sum_dtype = arithmetic_dtype(x.dtype)
    if weight.is_floating_point() and bias.is_floating_point():
        weight, bias = weight.to(sum_dtype), bias.to(sum_dtype)
    if torch.compiler.is_compiling():
        # Dynamo does not see that an argument of func.grad requires grad; of a view it does.
        x, gates = x.view_as(x), gates.view_as(gates)
        weight, bias = weight.view_as(weight), bias.view_as(bias)
    try:
        y, _ = _call.apply(_GATE_ADD_NORM, x, gates, weight, bias, eps)
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    normed: Tensor = y
    return normed


class GateAddNorm(torch.autograd.Function):
    """(x, gates, weight, bias, eps) -> (y, mean and one over the deviation of each row)."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _call.compute("gate_add_norm", *inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, gates, weight, _, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        _call.leave_unused(ctx)
        ctx.save_for_backward(x, gates, weight, output[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 5
        grad_x, grad_gates, grad_parameters = _call.apply(
            _GATE_ADD_NORM_BACKWARD, grad_y, *ctx.saved_tensors, ctx.eps
        )
        return (grad_x, grad_gates, *grad_parameters.unbind(0), None)


class GateAddNormBackward(torch.autograd.Function):
    """(grad_y, x, gates, weight, norms, eps) -> gradients of x, of gates, and (2, C) of weight and
    bias."""

    @staticmethod
    def forward(*inputs: Any) -> Gradients:
        result: Gradients = _call.compute("gate_add_norm_backward", *inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        grad_y, x, gates, weight, _, ctx.eps = inputs
        ctx.save_for_backward(grad_y, x, gates, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """`norms` is a function of x and gates, and so are the gradients without it."""

        def norm(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return reference.gate_add_norm(x, gates, weight, bias, eps=ctx.eps)

        def gradients(grad_y: Tensor, x: Tensor, gates: Tensor, weight: Tensor) -> Gradients:
            pull_back = _call.pull_back(norm, x, gates, weight, torch.zeros_like(weight))
            grad_x, grad_gates, *of_parameters = pull_back(grad_y)
            return grad_x, grad_gates, torch.stack(of_parameters)

        pull_back = _call.pull_back(gradients, *ctx.saved_tensors)
        return (*pull_back(grads), None, None)


def _shapes(x: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    norms = x.new_empty(*x.shape[:-1], 2, dtype=arithmetic_dtype(x.dtype))
    return x.new_empty(x.shape), norms


def _backward_shapes(grad_y: Tensor, x: Tensor, *others: Any, **options: Any) -> Gradients:
    *rows, channels = x.shape
    parameters = x.new_empty(2, channels, dtype=arithmetic_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(*rows, 2 * channels), parameters


_call.register_autograd("gate_add_norm", GateAddNorm)
_call.register_fake("gate_add_norm", _shapes)
_GATE_ADD_NORM = _call.positional("gate_add_norm", GateAddNorm)
_call.register_autograd("gate_add_norm_backward", GateAddNormBackward)
_call.register_fake("gate_add_norm_backward", _backward_shapes)
_GATE_ADD_NORM_BACKWARD = _call.positional("gate_add_norm_backward", GateAddNormBackward)
