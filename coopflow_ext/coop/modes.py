"""torch's modes and defaults, which are the caller's, as a training needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from coopflow_ext.autocast import full_precision


@contextmanager
def usual_modes() -> Iterator[None]:
    """Inside, torch is as it is after its import, whatever the caller has set: default dtype
    float32, gradients on, no inference mode, no autocast. Everything is restored at the end.

    The default dtype is the process's: another thread sees the change.

    Raises:
        ValueError: the default device is not the CPU; a default cannot be taken back inside a
            ``with torch.device(…)``.
    """
    device = torch.get_default_device()
    if device.type != "cpu":
        raise ValueError(
            f"training needs torch's default device to be the CPU, got {device}; the argument "
            "`device` says where to train"
        )
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            full_precision("cpu"),
            full_precision("cuda"),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
