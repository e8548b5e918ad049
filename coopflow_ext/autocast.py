"""Autocast where it must be off, and where a pass runs again in a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


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


def as_it_is(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """What enters again the autocast of this moment, for a pass that is recomputed later."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype, enabled=enabled)
