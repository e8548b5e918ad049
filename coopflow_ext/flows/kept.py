"""What a layer works out once and keeps beside its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """A value worked out from a buffer, kept as long as the buffer stays as it is.

    That is while it is the same tensor at the same version, the number that torch raises with every
    write in place (writes through ``.data`` and broadcasts between processes do not count). So a
    module that was moved, cast, loaded or averaged works the value out once more. The value is no
    state: a copy or a pickle of its owner starts without.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, tuple[object, ...], T] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()

    def get(self, work_out: Callable[[], T | None], buffer: Tensor, *constants: object) -> T | None:
        """The value for this buffer and these constants; None is not kept."""
        if torch.compiler.is_compiling():  # what a graph computes must be in the graph
            return work_out()
        kept = self._kept
        if kept is not None and kept[0] is buffer:
            _, version, then, value = kept
            if version == buffer._version and then == constants:
                return value
        with torch.inference_mode(False):  # a tensor made in inference mode has no gradients later
            new = work_out()
        if new is not None and not buffer.is_inference() and not _capturing():
            self._kept = buffer, buffer._version, constants, new
        return new


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, when nothing has a value yet."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
