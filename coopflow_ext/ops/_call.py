"""How an op is called: errors, autograd.Functions, and what torch is told about the raw ops."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from coopflow_ext._extension import native
from coopflow_ext._tensors import in_transform
from coopflow_ext.autocast import full_precision
from coopflow_ext.errors import BuildError


class _Missing:
    """Stands for the operators when the library is missing: importing works, using raises."""

    def __getattr__(self, name: str) -> Any:
        return getattr(native(), name)


coopflow: Any  # torch.ops.coopflow
try:
    coopflow = native()
except BuildError:
    coopflow = _Missing()


# What csrc writes before the message of a type error, and of a driver that is too old.
_TYPE_ERROR = "TypeError: "
_BUILD_ERROR = "BuildError: "
# How torch begins when a call does not fit the schema; our own checks write no parentheses.
_SCHEMA_ERROR = re.compile(r"coopflow::\w+\(\) ")
# Of the type asked for and yet refused: an int beyond 64 bits.
_TOO_LARGE = re.compile(r"type '(\w+)' for argument .* found type '\1'\.$")


def argument_error(error: RuntimeError) -> Exception:
    """What a check of an op's arguments found, as ValueError or TypeError; a library that cannot
    compute here is a BuildError; others as they are."""
    message = str(error).partition("\n")[0]
    if message.startswith(("Could not run 'coopflow::", "unsupported memory format")):
        return ValueError(
            "tensors must be dense and on a device that the library has code for (see `coopflow "
            f"info`): {message.partition('. ')[0]}"
        )
    if message.startswith(f"{_TYPE_ERROR}coopflow::"):
        return TypeError(message.removeprefix(_TYPE_ERROR))
    if message.startswith(f"{_BUILD_ERROR}coopflow: "):
        return BuildError(message.removeprefix(_BUILD_ERROR))
    if _SCHEMA_ERROR.match(message):
        if _TOO_LARGE.search(message):
            return ValueError(message.replace("found type 'int'", "found one beyond 64 bits"))
        return TypeError(message)
    return ValueError(message) if message.startswith("coopflow::") else error


class _Bound:
    """What :class:`inspect.BoundArguments` is for arguments that are complete and positional."""

    kwargs: dict[str, Any] = {}  # noqa: RUF012  (never written)

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args

    def apply_defaults(self) -> None:
        pass


class _Positional(inspect.Signature):
    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args)


def positional(op: str, function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The Function, which is only applied to all the arguments of an op, by position.

    ``Function.apply`` would inspect forward's signature and bind the arguments to it at each call:
    36 us instead of 17 for a coupling of four numbers, on one core.
    """
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in _argument_names(op)
    ]
    function.forward.__signature__ = _Positional(parameters)  # type: ignore[attr-defined]
    return function


def _argument_names(op: str) -> list[str]:
    if isinstance(coopflow, _Missing):
        return []
    return [argument.name for argument in getattr(coopflow, op).default._schema.arguments]


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``; its forward alone, at a third of the cost, where nothing has
    derivatives.

    Forward mode and ``vmap``, which work under no_grad too, have to reach ``apply``: there they
    raise.
    """
    if in_forward_mode() or _has_derivatives(args):
        return function.apply(*args)
    return function.forward(*args)


def in_forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: object) -> bool:
    """Whether it is a tensor with a derivative of forward mode, which compiled code has none of."""
    if torch.compiler.is_compiling() or not in_forward_mode() or not isinstance(tensor, Tensor):
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def _has_derivatives(args: Iterable[Any]) -> bool:
    grad_mode = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return grad_mode
    if in_transform():
        return grad_mode or _under_vmap(args)
    return grad_mode and any(isinstance(t, Tensor) and t.requires_grad for t in args)


def _under_vmap(args: Iterable[Any]) -> bool:
    functorch = torch._C._functorch
    for tensor in args:
        while isinstance(tensor, Tensor) and functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    return False


def compute(op: str, *args: Any, **options: Any) -> Any:
    """What a raw op returns where nothing has derivatives, as in the forward of its Function: torch
    would go through Python code to find that out, which takes as long again as calling the op."""
    raw = getattr(coopflow, op)
    if torch.compiler.is_compiling():
        return raw(*args, **options)
    with torch._C._AutoDispatchBelowAutograd():
        return raw.default(*args, **options)


def pull_back(function: Callable[..., Any], *inputs: Any) -> Callable[..., Any]:
    """The second result of ``torch.func.vjp`` for a backward pass, which the caller may have put
    into autocast, and into hooks of saved tensors, of which torch.func wants to know nothing."""
    if torch.compiler.is_compiling():
        return torch.func.vjp(function, *inputs)[1]
    device = inputs[0].device.type
    with full_precision(device), _without_hooks():
        found = torch.func.vjp(function, *inputs)[1]

    def pulled(*cotangents: Any) -> Any:
        with full_precision(device), _without_hooks():
            return found(*cotangents)

    return pulled


@contextmanager
def _without_hooks() -> Iterator[None]:
    """Inside, tensors that autograd saves go through no hook of ``torch.autograd.graph``."""
    autograd, hooks = torch._C._autograd, []
    while (pair := autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(pair)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(*pair)


def leave_unused(ctx: Any) -> None:
    """Results that nobody used, or that have no gradient, get None in backward, not zeros."""
    if not torch.compiler.is_compiling():  # which cannot trace it
        ctx.set_materialize_grads(False)


def register_autograd(name: str, function: type[torch.autograd.Function]) -> None:
    """The Function's derivative for those who call the raw op; torch.func needs the Function."""
    if not isinstance(coopflow, _Missing):
        torch.library.register_autograd(
            f"coopflow::{name}", function.backward, setup_context=function.setup_context
        )


def register_fake(name: str, shapes: Callable[..., Any]) -> None:
    """Teaches torch the shapes of an op's results."""
    if isinstance(coopflow, _Missing):
        return
    op = f"coopflow::{name}"
    names = _argument_names(name)

    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_devices(op, {**dict(zip(names, args, strict=False)), **kwargs})
        return shapes(*args, **kwargs)

    torch.library.register_fake(op)(checked)


def register_flops(name: str, count: Callable[..., int]) -> None:
    """Teaches torch's FlopCounterMode what an op multiplies and adds, from the shapes of its
    arguments: a multiplication and an addition are two."""
    if not isinstance(coopflow, _Missing):
        register_flop_formula(getattr(coopflow, name))(count)


def _check_devices(op: str, given: dict[str, Any]) -> None:
    """What the kernels check, for calls that end at a fake kernel because one tensor is "meta"."""
    first, *others = _tensors_by_name(given)
    for name, tensor in others:
        if tensor.device != first[1].device:
            raise ValueError(
                f"{op}: {name.removesuffix('_t')}: must be on the device of {first[0]}, "
                f"{first[1].device}, got {tensor.device}"
            )


def _tensors_by_name(given: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Those of a list as NAME[i]."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{i}]", t) for i, t in enumerate(value) if isinstance(t, Tensor))


def no_result(*args: Any, **kwargs: Any) -> None:
    """The fake kernel of an op that works in place."""
