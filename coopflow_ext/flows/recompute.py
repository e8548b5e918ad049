"""Back-propagation through a flow that keeps its last output only (Gomez et al. 2017, RevNet).

The inputs of the layers are rebuilt from the output by the layers' inverses, one at a time, so
memory does not grow with depth; it costs one more pass in the inverse direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from coopflow_ext.autocast import as_it_is
from coopflow_ext.flows.base import Compose, Context, Transform
from coopflow_ext.flows.couplings import MixtureLogisticCoupling
from coopflow_ext.flows.folding import as_folded_here, folding
from coopflow_ext.flows.layers import SplitPrior, halves
from coopflow_ext.flows.weight_norm import WeightNormed

# At so many places, spread over the depth, every _STRIDE-th element of a layer's input is kept and
# compared with what was rebuilt: together at most one more x, whatever the depth.
_N_CHECKS = 8
_STRIDE = 8
_TOLERANCE = {torch.float64: 1e-6}
_DEFAULT_TOLERANCE = 1e-2

_deferred: ContextVar[list[Tensor] | None] = ContextVar("coopflow_deferred", default=None)


class _Factor(Enum):
    """What a factor-out does to the stack of halves that wait for the end of an inner chain."""

    OUT = "push the second half of x"
    BACK = "pop it and put it behind x"


_Step = Transform | _Factor


def primitive_steps(transform: Transform) -> Iterator[_Step]:
    """The layers of nested chains and factor-outs, in order."""
    if isinstance(transform, Compose):
        for layer in transform.transforms:
            assert isinstance(layer, Transform)
            yield from primitive_steps(layer)
    elif isinstance(transform, SplitPrior):
        yield _Factor.OUT
        yield from primitive_steps(transform.inner)
        yield _Factor.BACK
    else:
        yield transform


def _push(x: Tensor, stack: list[Tensor]) -> Tensor:
    kept, factored_out = halves(x)
    stack.append(factored_out)
    return kept


def _pop(x: Tensor, stack: list[Tensor]) -> Tensor:
    return torch.cat((x, stack.pop()), dim=1)


def check_invertible(transform: nn.Module) -> None:
    """ValueError for layers whose inverse is not exact."""
    for module in transform.modules():
        if isinstance(module, MixtureLogisticCoupling) and module.legacy_cdf_clamp:
            raise ValueError("recompute needs exact inverses, so legacy_cdf_clamp must be False")


@contextmanager
def deferred_checks() -> Iterator[list[Tensor]]:
    """Forward passes inside are differentiated without waiting for the device: where a backward
    pass would raise, it adds the worst error of what it has rebuilt to the list, 0-d and in units
    of what is allowed. More than 1, or NaN, is for the caller to refuse, with :func:`complaint`."""
    errors: list[Tensor] = []
    token = _deferred.set(errors)
    try:
        yield errors
    finally:
        _deferred.reset(token)


def complaint(error: float) -> str:
    """What to say of a worst error, in units of what is allowed."""
    return (
        f"recompute: inputs rebuilt by the inverse are off by {error:.1e} times what is allowed "
        f"({_DEFAULT_TOLERANCE:g} of 1 + |x|, in float64 {_TOLERANCE[torch.float64]:g}); the "
        "gradients would be wrong. Use more precision or recompute=False"
    )


def _witness(x: Tensor) -> Tensor:
    return x.flatten(1)[:, ::_STRIDE].clone()


class _Recompute(torch.autograd.Function):
    """(steps, context, x, aux, parameters…) → (z, ladj)."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: list[_Step],
        context: Context,
        x: Tensor,
        aux: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        every = -(-len(steps) // _N_CHECKS)
        witnesses: dict[int, Tensor] = {}
        stack: list[Tensor] = []
        total = x.new_zeros(x.shape[0])
        ctx.autocast = as_it_is(x.device.type, keeps_casts=False)
        with ctx.autocast():
            for index, step in enumerate(steps):
                if index % every == 0:
                    witnesses[index] = _witness(x)
                if isinstance(step, _Factor):
                    x = _push(x, stack) if step is _Factor.OUT else _pop(x, stack)
                else:
                    with folding(step, WeightNormed):  # the weights of one step at a time
                        x, ladj = step.call_and_ladj(x, context)
                    total = total + ladj
        ctx.steps, ctx.context = steps, replace(context, aux=None)
        ctx.checked = list(witnesses)
        ctx.folded = as_folded_here()
        ctx.deferred = _deferred.get()  # of this thread: a backward pass may run in another
        ctx.save_for_backward(x, aux, *witnesses.values())
        return x, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_ladj: Tensor) -> tuple[Any, ...]:
        x, aux, *kept = ctx.saved_tensors
        witnesses = dict(zip(ctx.checked, kept, strict=True))
        if aux is not None:
            aux = aux.detach().requires_grad_()
        context = replace(ctx.context, aux=aux)
        grads: dict[Tensor | None, Tensor] = {}
        stack: list[Tensor] = []
        grad_stack: list[Tensor] = []
        errors = []
        with ctx.autocast(), ctx.folded():
            for index in reversed(range(len(ctx.steps))):
                step = ctx.steps[index]
                if isinstance(step, _Factor):
                    undo = _pop if step is _Factor.OUT else _push
                    x, grad = undo(x, stack), undo(grad, grad_stack)
                else:
                    with torch.enable_grad(), folding(step, WeightNormed):
                        with torch.no_grad():
                            x, _ = step.inverse_and_ladj(x, context)
                        grad = _layer_backward(step, x, context, (grad, grad_ladj), grads)
                if index in witnesses and x.numel():
                    expected = witnesses[index]
                    errors.append(((_witness(x) - expected).abs() / (1 + expected.abs())).max())
        if errors:
            _check(torch.stack(errors).max(), ctx.deferred)
        return None, None, grad, grads.get(aux), *(grads.get(p) for p in _parameters(ctx.steps))


def _layer_backward(
    layer: Transform,
    x: Tensor,
    context: Context,
    grads_out: tuple[Tensor, Tensor],
    grads: dict[Tensor | None, Tensor],
) -> Tensor:
    """Add the gradients of the layer's parameters (and of aux) to ``grads``; returns that of x."""
    x = x.detach().requires_grad_()
    inputs: list[Tensor] = [p for p in layer.parameters() if p.requires_grad]
    if context.aux is not None:
        inputs.append(context.aux)
    with torch.enable_grad():
        outputs = layer.call_and_ladj(x, context)
    differentiable = [
        (out, g) for out, g in zip(outputs, grads_out, strict=True) if out.requires_grad
    ]
    grad_x, *rest = torch.autograd.grad(
        [out for out, _ in differentiable],
        [x, *inputs],
        [g for _, g in differentiable],
        allow_unused=True,
    )
    for tensor, g in zip(inputs, rest, strict=True):
        if g is not None:
            before = grads.get(tensor)
            grads[tensor] = g if before is None else before + g
    return grad_x


def _check(worst: Tensor, deferred: list[Tensor] | None) -> None:
    error = worst / _TOLERANCE.get(worst.dtype, _DEFAULT_TOLERANCE)
    if deferred is not None:
        deferred.append(error)
    elif not (times := error.item()) <= 1:
        raise RuntimeError(complaint(times))


def _parameters(steps: list[_Step]) -> list[Tensor]:
    """Every parameter once."""
    layers = [step for step in steps if isinstance(step, Transform)]
    return list(dict.fromkeys(p for layer in layers for p in layer.parameters()))


def _check_learned(transform: nn.Module) -> None:
    """RuntimeError where a layer has a tensor that wants a gradient and is no parameter: it would
    get none."""
    for module in transform.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"recompute needs every tensor that is learned as a parameter, but {name} of a "
                    f"{type(module).__name__} is none, as pruning, DataParallel and "
                    "FullyShardedDataParallel make them; use recompute=False"
                )


def call_and_ladj(
    transform: Transform, x: Tensor, context: Context, *, recompute: bool
) -> tuple[Tensor, Tensor]:
    """``transform.call_and_ladj(x, context)``; with ``recompute`` memory is constant in depth.

    It is then differentiable once, and the backward pass reads one number from the device, unless
    the call was made inside :func:`deferred_checks`.

    Raises:
        RuntimeError: in the backward pass, when rebuilt inputs are off by more than 1e-2 of
            1 + |x| (float64: 1e-6); at once, where what is learned is no parameter.
    """
    if not (recompute and torch.is_grad_enabled()):
        return transform.call_and_ladj(x, context)
    _check_learned(transform)
    steps = list(primitive_steps(transform))
    z, ladj = _Recompute.apply(  # type: ignore[no-untyped-call]
        steps, context, x, context.aux, *_parameters(steps)
    )
    return z, ladj
