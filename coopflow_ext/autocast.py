"""Autocast where it must be off, and where a pass runs again in a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def in_precision(precision: str, device_type: str) -> AbstractContextManager[Any]:
    """Autocast to "bfloat16"; off for "float32"."""
    if precision == "float32":
        return full_precision(device_type)
    return torch.autocast(device_type, torch.bfloat16)


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off; nothing to enter where it is off already."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """In which a product would take x here: autocast's, where it is on and x is in float32."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@contextmanager
def tensor_float32(allowed: bool | None) -> Iterator[None]:
    """Whether products and convolutions in float32 may round their factors to TF32 on CUDA; None
    leaves torch's flags, which are the process's, as they are. They are restored afterwards."""
    backends: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    if allowed is None:
        yield
        return
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, flag in zip(backends, before, strict=True):
            backend.allow_tf32 = flag


def as_it_is(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """What enters again the autocast of this moment, for a pass that is recomputed later."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype, enabled=enabled)
