"""What layers compute from their parameters alone, computed once for all that a pass, or many
passes, need of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

_T = TypeVar("_T")


class _Values(dict[Any, Any]):
    """By layer; ``outer`` are those that were folded around them, which are in here too."""

    outer: _Values | None = None


# A context variable: every thread, and every asyncio task, has its own.
_folded: ContextVar[_Values | None] = ContextVar("coopflow_folded", default=None)


class Foldable:
    """A layer that computes something from its parameters alone, whatever its input."""

    def fold(self) -> Any:
        """The value that passes can share."""
        raise NotImplementedError

    @staticmethod
    def fold_all(layers: Sequence[Any], *, frozen: bool, inverse: bool) -> Sequence[Any]:
        """The values of several layers, all of which have this method; for one operator that
        computes them together. For ``frozen`` and ``inverse`` see :func:`folding`."""
        return [layer.fold() for layer in layers]

    def folded(self) -> Any | None:
        """The value that is folded where this runs, or None. A compiled graph uses none."""
        if torch.compiler.is_compiling():
            return None
        values = _folded.get()
        return None if values is None else values.get(self)

    def unfold(self) -> None:
        """Forgets the value where this runs, because the layer has changed itself."""
        values = None if torch.compiler.is_compiling() else _folded.get()
        while values is not None:
            values.pop(self, None)
            values = values.outer


def by_kind(kinds: Sequence[Hashable], fold: Callable[[list[int]], Iterable[_T]]) -> list[_T]:
    """The values of layers in their order, from ``fold`` of the numbers of those of a kind."""
    numbers: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        numbers.setdefault(kind, []).append(i)
    values: dict[int, _T] = {}
    for together in numbers.values():
        values.update(zip(together, fold(together), strict=True))
    return [values[i] for i in range(len(kinds))]


def folding(
    module: nn.Module,
    kind: type[Foldable] = Foldable,
    *,
    frozen: bool = False,
    inverse: bool = True,
) -> AbstractContextManager[None]:
    """Inside, in this thread (or task) only, the layers in ``module`` are folded.

    Args:
        kind: which layers; those that are folded already stay as they are.
        frozen: their values have no gradients; otherwise they have where gradients are on.
        inverse: also what only inverse passes need.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return _folding(module, kind, frozen, inverse)


@contextmanager
def _folding(
    module: nn.Module, kind: type[Foldable], frozen: bool, inverse: bool
) -> Iterator[None]:
    outer = _folded.get()
    values = _Values(outer or ())
    values.outer = outer
    together: dict[Callable[..., Sequence[Any]], list[Foldable]] = {}
    for layer in dict.fromkeys(_foldable(module)):  # a shared one once
        if isinstance(layer, kind) and layer not in values:
            together.setdefault(layer.fold_all, []).append(layer)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        for fold_all, layers in together.items():
            values.update(
                zip(layers, fold_all(layers, frozen=frozen, inverse=inverse), strict=True)
            )
    with _entered(values):
        yield


def as_folded_here() -> Callable[[], AbstractContextManager[None]]:
    """What enters again what is folded at this moment, for a pass that is recomputed later."""
    values = _folded.get()
    return lambda: _entered(values)


@contextmanager
def _entered(values: _Values | None) -> Iterator[None]:
    token = _folded.set(values)
    try:
        yield
    finally:
        _folded.reset(token)


def is_folded(module: nn.Module) -> bool:
    """Whether a layer in ``module`` is folded where this runs."""
    folded = _folded.get()
    return folded is not None and any(layer in folded for layer in _foldable(module))


def _foldable(module: nn.Module) -> Iterator[Foldable]:
    """As ``module.modules()``, but quicker: nothing is looked for in foldable layers."""
    if isinstance(module, Foldable):
        yield module
        return
    for child in module._modules.values():
        if child is not None:
            yield from _foldable(child)
