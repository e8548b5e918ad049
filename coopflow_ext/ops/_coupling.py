"""What the couplings share: four autograd.Functions each, made from the op and its reference.

First derivatives are compiled ops. Their derivatives, which autograd needs only where it
differentiates a backward pass, come from plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coopflow_ext._tensors import arithmetic_dtype, check_tensors
from coopflow_ext.ops import _call

Function = type[torch.autograd.Function]
Map = Callable[..., tuple[Tensor, Tensor]]
"""(x, params, *options) -> (y, ladj), or a gradient of it."""


def vjp_of(forward: Map) -> Map:
    """(gy, gl, x, params, *options) -> (gx, gparams) of a coupling ``forward``."""

    def gradients(
        grad_y: Tensor, grad_ladj: Tensor, x: Tensor, params: Tensor, *options: bool
    ) -> tuple[Tensor, Tensor]:
        pull_back = _call.pull_back(lambda x, params: forward(x, params, *options), x, params)
        result: tuple[Tensor, Tensor] = pull_back((grad_y, grad_ladj))
        return result

    return gradients


def inverse_vjp_of(forward: Map) -> Map:
    """(gx, gl, x, params, *options) -> (gy, gparams) of the inverse of an elementwise ``forward``
    where its result is x: by the implicit function theorem for y = forward(x)."""

    def gradients(
        grad_x: Tensor, grad_ladj: Tensor, x: Tensor, params: Tensor, *options: bool
    ) -> tuple[Tensor, Tensor]:
        work = arithmetic_dtype(x.dtype)
        x, grad_x = x.to(work), grad_x.to(work)
        pull_back = _call.pull_back(lambda x, params: forward(x, params, *options), x, params)
        slope, _ = pull_back((torch.ones_like(x), torch.zeros_like(grad_ladj)))
        along, _ = pull_back((torch.zeros_like(x), -grad_ladj))
        grad_y = (grad_x + along) / slope.clamp(min=torch.finfo(work).tiny)
        _, grad_params = pull_back((-grad_y, -grad_ladj))
        return grad_y, grad_params

    return gradients


def differentiable(
    op: str, gradients: Map, saved: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> Function:
    """The Function of an op (state, params, *options) -> (changed state, ladj).

    Args:
        op: its name; ``<op>_backward`` computes its gradients.
        gradients: the same in PyTorch, for derivatives of the gradients.
        saved: of state and changed state, what ``<op>_backward`` is given before the params.
    """
    backward_function = _backward(f"{op}_backward", gradients)

    class Coupling(torch.autograd.Function):
        @staticmethod
        def forward(state: Tensor, params: Tensor, *options: bool) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = _call.compute(op, state, params, *options)
            return result

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            state, params, *ctx.options = inputs
            ctx.save_for_backward(*saved(state, output[0]), params)

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
            found: tuple[Tensor, Tensor] = _call.apply(
                backward_function,
                grad_out.contiguous(),
                grad_ladj.contiguous(),
                *ctx.saved_tensors,
                *ctx.options,
            )
            return (*found, *[None] * len(ctx.options))

    _call.register_autograd(op, Coupling)
    _call.register_fake(op, _shapes)
    return _call.positional(op, Coupling)


def _backward(op: str, gradients: Map) -> Function:
    class CouplingBackward(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = _call.compute(op, *inputs)
            return result

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.options = [value for value in inputs if not isinstance(value, Tensor)]
            ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            def in_their_dtypes(*tensors: Tensor) -> tuple[Tensor, Tensor]:
                grad_state, grad_params = gradients(*tensors, *ctx.options)
                *_, state, params = tensors
                return grad_state.to(state.dtype), grad_params.to(params.dtype)

            pull_back = _call.pull_back(in_their_dtypes, *ctx.saved_tensors)
            return (*pull_back(grads), *[None] * len(ctx.options))

    _call.register_autograd(op, CouplingBackward)
    _call.register_fake(op, _backward_shapes)
    return _call.positional(op, CouplingBackward)


def _shapes(state: Tensor, params: Tensor, *options: bool) -> tuple[Tensor, Tensor]:
    ladj = state.new_empty(state.shape[0], dtype=arithmetic_dtype(state.dtype))
    return torch.empty_like(state), ladj


def _backward_shapes(*inputs: Any) -> tuple[Tensor, Tensor]:
    *_, state, params = (value for value in inputs if isinstance(value, Tensor))
    return torch.empty_like(state), torch.empty_like(params)


def coupling(
    function: Function, name: str, state: Tensor, params: Tensor, *options: bool
) -> tuple[Tensor, Tensor]:
    """(changed state, ladj) for a face, from tensors of any layout; ``name`` is the state's."""
    check_tensors(**{name: state, "params": params})
    try:
        out, ladj = _call.apply(function, state.contiguous(), params.contiguous(), *options)
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    return out, ladj
