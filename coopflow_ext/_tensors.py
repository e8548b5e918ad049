"""What is asked of a tensor that a user hands over."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, value: object, dtype: torch.dtype | None = None) -> None:
    """TypeError unless ``value`` is a floating-point tensor, of ``dtype`` where one is given.

    Under autocast any floating-point dtype passes: the layers cast for themselves.
    """
    if not isinstance(value, Tensor):
        kind = type(value)
        origin = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        raise TypeError(f"{name} must be a torch.Tensor, got {origin}{kind.__qualname__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if dtype in (None, value.dtype) or torch.is_autocast_enabled(value.device.type):
        return
    raise TypeError(f"{name} must be {dtype}, the dtype of the parameters, got {value.dtype}")
