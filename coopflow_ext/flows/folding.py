"""What layers compute from their parameters alone, computed once for many passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

# By layer. A context variable: every thread, and every asyncio task, has its own.
_folded: ContextVar[Mapping[Foldable, Any]] = ContextVar(
    "coopflow_folded", default=MappingProxyType({})
)


class Foldable:
    """A layer that computes something from its parameters alone, whatever its input."""

    def fold(self) -> Any:
        """The value that passes can share."""
        raise NotImplementedError

    def folded(self) -> Any | None:
        """The value that is folded where this runs, or None. A compiled graph uses none."""
        return None if torch.compiler.is_compiling() else _folded.get().get(self)


@contextmanager
def folding(module: nn.Module) -> Iterator[None]:
    """Inside, in this thread (or task) only, the foldable layers in ``module`` are folded."""
    with torch.no_grad():
        values: dict[Foldable, Any] = {
            layer: layer.fold() for layer in module.modules() if isinstance(layer, Foldable)
        }
    token = _folded.set({**_folded.get(), **values})
    try:
        yield
    finally:
        _folded.reset(token)
