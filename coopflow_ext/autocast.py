"""Autocast where it must be off, and where a pass runs again in a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_is_on(device_type: str) -> bool:
    """Of the meta device torch refuses to say it."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


@contextmanager
def in_precision(precision: str, device_type: str) -> Iterator[None]:
    """Autocast to "bfloat16"; off for "float32"."""
    if precision == "float32":
        with full_precision(device_type):
            yield
        return
    with torch.autocast(device_type, torch.bfloat16):
        try:
            yield
        finally:
            # torch does so at the end of the outermost autocast alone, which may be the caller's
            # and outlive a change of the weights.
            torch.clear_autocast_cache()


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off; nothing to enter where it is off already."""
    if not autocast_is_on(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def uncached_casts(device_type: str) -> AbstractContextManager[Any]:
    """Where autocast is on, it casts weights and other leaves at each use, here and in further
    autocasts inside, instead of keeping their casts to its end: for what changes in place until
    then, or is there longer."""
    if not autocast_is_on(device_type):
        return nullcontext()
    return as_it_is(device_type, keeps_casts=False)()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """In which a product would take x here: autocast's, where it is on and x is in float32."""
    if x.dtype == torch.float32 and autocast_is_on(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@contextmanager
def tensor_float32(allowed: bool | None) -> Iterator[None]:
    """Whether products and convolutions in float32 may round their factors to TF32 on CUDA; None
    leaves torch's flags, which are the process's, as they are. They are restored afterwards."""
    if allowed is None:
        yield
        return
    flags = [flag for backend in _TF32_BACKENDS for flag in _tf32_flags(*backend)]
    # A flag that is put back would fix a setting that had followed one for all.
    settings = [(each, "fp32_precision") for _, newer in _TF32_BACKENDS for each in newer]
    before = [(*of, getattr(*of)) for of in (*flags, *settings)]
    for backend, name in flags:
        setattr(backend, name, allowed if name == _FLAG else "tf32" if allowed else "ieee")
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


_BACKENDS: Any = torch.backends  # whose stubs lack what is newer
_FLAG = "allow_tf32"
# Which has the flag, and which have the settings that torch has in place of it since 2.9.
_TF32_BACKENDS: tuple[tuple[Any, tuple[Any, ...]], ...] = (
    (_BACKENDS.cuda.matmul, (_BACKENDS.cuda.matmul,)),
    (_BACKENDS.cudnn, (_BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn)),
)


def _tf32_flags(backend: Any, newer: Sequence[Any]) -> list[tuple[Any, str]]:
    """The flag, or the newer settings where the caller has used these: torch then refuses to read
    a flag that says something else."""
    try:
        getattr(backend, _FLAG)
    except RuntimeError:
        return [(each, "fp32_precision") for each in newer]
    return [(backend, _FLAG)]


def float32_precision() -> tuple[str, ...]:
    """How products and convolutions in float32 are computed on CUDA, as torch names it."""
    settings = _BACKENDS, _BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv
    return tuple(each.fp32_precision for each in settings)


def as_it_is(
    device_type: str, *, keeps_casts: bool = True
) -> Callable[[], AbstractContextManager[Any]]:
    """What enters again the autocast of this moment, for a pass that is recomputed later.

    Args:
        keeps_casts: of leaves, to its end. Those made without gradients are used by torch 2.10
            where gradients are wanted, and the weights then get none.
    """
    if device_type == "meta":
        return nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    cached = keeps_casts and torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=cached)
