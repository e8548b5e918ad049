"""Pure functions of tensors that are compiled once for all calls of a kind."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from coopflow_ext.errors import reason

_numbers = itertools.count()


class _Compiled:
    """One function for one kind of call; where it cannot be compiled, one warning, and it runs as
    it is."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function

        def kind(*args: Any) -> Tensor:
            return function(*args)

        # torch.compile gives up on a code object after eight variants, and where a size differs
        # from call to call of code by this name, file and line it asks for code of any size.
        name = f"{function.__name__.strip('_')}_{next(_numbers)}"
        kind.__code__ = kind.__code__.replace(co_name=name)
        self._compiled: Callable[..., Tensor] | None = torch.compile(kind, fullgraph=True)

    def __call__(self, *args: Any) -> Tensor:
        if self._compiled is not None:
            try:
                return self._compiled(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._compiled = None
                warnings.warn(
                    "compile=True: torch.compile could not compile a block of the flow, which "
                    f"runs without: {reason(error)}",
                    stacklevel=2,
                )
        return self._function(*args)


@functools.cache
def _of_kind(function: Callable[..., Tensor], kind: Hashable) -> _Compiled:
    return _Compiled(function)


def compiled_for(function: Callable[..., Tensor], kind: Hashable) -> Callable[..., Tensor]:
    """``function``, which is pure, compiled at its first call for a kind of arguments.

    Args:
        function: from tensors (or tuples of them) to a tensor.
        kind: what its calls have in common, but for the batch: that is fixed in the first code, and
            free in the code for a second batch. With and without gradients are two kinds.
    """
    return _of_kind(function, (kind, torch.is_grad_enabled()))
