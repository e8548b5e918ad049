"""Small facts about tensors that the whole package shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coopflow_ext.autocast import autocast_is_on
from coopflow_ext.errors import reason

Coefficient = float | Tensor
"""Of a step: one number, or a table (T or 1, B or 1) with a row for each step."""


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the ops compute in: float64 for double, float32 for everything below."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest(xs: Sequence[Tensor]) -> torch.dtype:
    """What is computed in where tensors come together: float64 if one of them is double."""
    return torch.float64 if torch.float64 in (x.dtype for x in xs) else torch.float32


def flat(x: Tensor) -> Tensor:
    """(B, elements of a chain), also of a state (B,) and of empty ones."""
    return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)


def leaf_of(x: Tensor) -> Tensor:
    """A leaf with x's memory. torch.func's transforms forbid ``requires_grad_()``, even of what
    they do not transform, but not this."""
    return nn.Parameter(x.detach()) if in_transform() else x.detach().requires_grad_()


def in_transform() -> bool:
    """Whether one of torch.func's is at work."""
    return torch._C._functorch.maybe_current_level() is not None


def per_chain_view(values: Tensor, x: Tensor) -> Tensor:
    """(B,) shaped to broadcast against x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def table_row(table: Tensor, step: int) -> Tensor:
    """The row of a (T or 1, B or 1) table of coefficients that a step uses, (B or 1,)."""
    return table[step if table.shape[0] > 1 else 0]


@contextmanager
def room_for(what: str, shape: Sequence[int], dtype: torch.dtype) -> Iterator[None]:
    """Where memory for ``what`` is allocated inside, an error says what, and how many bytes it was
    to have."""
    try:
        yield
    except RuntimeError as error:
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
        raise kind(
            f"{what} of shape {tuple(shape)} in {dtype} would take "
            f"{math.prod(shape) * dtype.itemsize:,} bytes: {reason(error)}"
        ) from error


def safe_sqrt(x: Tensor) -> Tensor:
    """√x with derivative 0 at 0, where autograd's would be infinite."""
    zero = x == 0
    return torch.where(zero, x, torch.where(zero, 1.0, x).sqrt())


def norm_scale(rows: Sequence[Tensor], limit: float) -> Tensor:
    """min(1, limit/‖row‖) for the rows (B, n) of several tensors taken as one, (B,): what brings a
    norm to at most ``limit``, 1 also where it is 0 or NaN.

    Squares are taken in the scale of a row's largest element: they neither overflow nor vanish.
    """
    sizes = [row.detach().abs().amax(1) for row in rows if row.shape[1]]
    if not sizes:
        return torch.ones_like(rows[0][:, :1].sum(1))
    largest = torch.stack(sizes).amax(0) if len(sizes) > 1 else sizes[0]
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    squares = [(row / scale[:, None]).square().sum(1) for row in rows]
    norm = safe_sqrt(torch.stack(squares).sum(0))
    exceeds = norm > limit / scale
    return torch.where(exceeds, limit / scale / torch.where(exceeds, norm, 1.0), 1.0)


def parameter_dtype(module: nn.Module) -> torch.dtype | None:
    """That of the first parameter; None without one, as in replicas and quantized modules."""
    first = next(module.parameters(), None)
    return None if first is None else first.dtype


def as_tensor(name: str, value: Any, **options: Any) -> Tensor:
    """``torch.as_tensor`` whose errors name the argument; a tensor stays where it is, whatever
    torch's default device, unless ``device`` is given.

    Raises:
        TypeError: ``value`` is neither a tensor nor numbers.
    """
    if isinstance(value, Tensor):
        options.setdefault("device", value.device)
    try:
        return torch.as_tensor(value, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(value, Tensor):
            raise
        got = type(value).__name__
        raise TypeError(f"{name} must be a tensor or numbers, got {got}: {error}") from error


def check_tensors(**arguments: object) -> None:
    """TypeError, naming the argument, unless all are tensors."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise _not_a_tensor(name, value)


def check_tensor(name: str, value: object, dtype: torch.dtype | None = None) -> None:
    """TypeError unless ``value`` is a floating-point tensor, of ``dtype`` where one is given.

    Under autocast float32 and autocast's own pass too: the layers cast for themselves. Not beside
    parameters in float64, which autocast leaves alone.
    """
    if not isinstance(value, Tensor):
        raise _not_a_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if dtype in (None, value.dtype):
        return
    device_type = value.device.type
    if dtype != torch.float64 and autocast_is_on(device_type):
        allowed = dict.fromkeys((dtype, torch.float32, torch.get_autocast_dtype(device_type)))
        if value.dtype in allowed:
            return
        names = " or ".join(map(str, allowed))
        raise TypeError(f"{name} must be {names} under this autocast, got {value.dtype}")
    raise TypeError(f"{name} must be {dtype}, the dtype of the parameters, got {value.dtype}")


def _not_a_tensor(name: str, value: object) -> TypeError:
    kind = type(value)
    origin = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return TypeError(f"{name} must be a tensor, got {origin}{kind.__qualname__}")


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Which memory they lie in, for :func:`apart_from`."""
    return {t.untyped_storage()._cdata for t in tensors}


def apart_from(written: set[int], values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The values, copies where they lie in memory that is written before all have been read."""
    return tuple(v.clone() if v.untyped_storage()._cdata in written else v for v in values)
