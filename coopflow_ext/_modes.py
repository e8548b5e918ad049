"""torch's modes and defaults, which are the caller's, as a training needs them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from coopflow_ext.autocast import full_precision


@contextmanager
def usual_tensors() -> Iterator[None]:
    """Inside, new tensors are as after torch's import, whatever the caller has set: float32 where
    no dtype is given, and no inference tensors. The default dtype is the process's: another thread
    sees the change."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(dtype)


_seeding = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's draws on the CPU begin at ``seed``; the caller's go on afterwards as if there
    had been none. The generator is the process's: threads wait for each other here, and none may
    draw from it elsewhere meanwhile."""
    with _seeding, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def training_modes() -> Iterator[None]:
    """Inside, torch's modes are as after its import, whatever the caller has set: default dtype
    float32, gradients on, no inference mode, no autocast. The default dtype is the process's."""
    with (
        usual_tensors(),
        torch.enable_grad(),
        full_precision("cpu"),
        full_precision("cuda"),
    ):
        yield


@contextmanager
def usual_modes() -> Iterator[None]:
    """:func:`training_modes`, and the default device that it cannot take back.

    Raises:
        ValueError: the default device is not the CPU; a default cannot be taken back inside a
            ``with torch.device(…)``.
    """
    device = torch.get_default_device()
    if device.type != "cpu":
        raise ValueError(
            f"this needs torch's default device to be the CPU, got {device}; the argument "
            "`device` says where to compute"
        )
    with training_modes():
        yield
