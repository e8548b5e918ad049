"""Coefficients of a chain: constants, schedules over the steps, values per chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from coopflow_ext._checks import check_number
from coopflow_ext._tensors import Coefficient, widest
from coopflow_ext.samplers.checks import check_can_copy, check_constant

_LARGEST_FLOAT = torch.finfo(torch.float32).max

Schedule = float | Tensor | Sequence[float] | Callable[[int], "float | Tensor"]
"""A constant, a callable of the step, (T,) values, or a (T or 1, B or 1) tensor."""


def coefficient(
    name: str, value: Schedule, n_steps: int, *, unless: str | None = ""
) -> Coefficient:
    """Check a non-negative schedule once and bring it to the form that the ops take: a float, or a
    float64 table on the CPU.

    Args:
        name: the option's name, for messages.
        value: see :data:`Schedule`; a callable is evaluated at steps 0 … n_steps − 1, at least at
            0, and may return a float or a (B,) tensor.
        n_steps: T.
        unless: the option without which no value may require grad, for the message; None: values
            may, and then are a table through which gradients flow.

    Raises:
        TypeError: not a schedule.
        ValueError: wrong length or shape, a negative value, NaN or infinity, or a value that
            requires grad and may not.
    """
    if isinstance(value, (int, float)):
        return check_number(name, value, minimum=0.0)
    if callable(value) and not isinstance(value, Tensor):
        table = _called(name, value, n_steps, unless)
    else:
        table = _table(name, value, unless)
        if table.ndim == 1 and len(table) != n_steps:
            raise ValueError(
                f"{name} must have one value for each of {n_steps} steps, got {len(table)}; "
                f"for one value for each of {len(table)} chains give shape (1, {len(table)})"
            )
    if table.is_complex() or table.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got {table.dtype}")
    if table.is_meta or table.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense tensor with data, got one of layout {table.layout} on "
            f"{table.device}"
        )
    table = table.to("cpu", torch.float64, copy=True)
    if table.ndim == 0:
        number = check_number(name, table.detach().item(), minimum=0.0)
        return table.reshape(1, 1) if table.requires_grad else number
    if table.numel() == n_steps == 0:
        return 0.0
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or table.shape[0] not in (1, n_steps) or table.shape[1] == 0:
        raise ValueError(
            f"{name} must be a number, ({n_steps},) or ({n_steps} or 1, B or 1), "
            f"got shape {tuple(table.shape)}"
        )
    if not bool((table.isfinite() & (table >= 0)).all()):
        raise ValueError(f"{name} must be finite and ≥ 0 at every step and for every chain")
    return float(table) if table.numel() == 1 and not table.requires_grad else table


def _table(name: str, value: float | Tensor | Sequence[float], unless: str | None = "") -> Tensor:
    """A tensor of the values; TypeError where there is none, ValueError where one requires grad
    and may not."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    if unless is not None:
        check_constant(name, *values, unless=unless)
    try:
        if values is value and any(isinstance(v, Tensor) and v.requires_grad for v in values):
            return torch.stack(
                [torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in value]
            )
        if isinstance(value, Tensor):  # as_tensor would move it to torch's default device
            return value
        return torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a number, a callable of the step or a tensor, "
            f"got {type(value).__name__}"
        ) from error


def _called(
    name: str, function: Callable[[int], float | Tensor], n_steps: int, unless: str | None
) -> Tensor:
    """The values of a callable of the step, (T, B or 1)."""
    rows = []
    for step in range(max(n_steps, 1)):  # a chain of no steps has a constant that none uses
        value = function(step)
        if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
            raise TypeError(
                f"{name}({step}) must be a number or a tensor (B,), got {type(value).__name__}"
            )
        if unless is not None:
            check_constant(f"{name}({step})", value, unless=unless)
        dtype = None if isinstance(value, Tensor) else torch.float64
        row = torch.as_tensor(value, dtype=dtype, device="cpu")
        if row.ndim > 1:
            raise ValueError(f"{name}({step}) must be a number or (B,), got {tuple(row.shape)}")
        rows.append(row.reshape(-1))
    widths = {row.numel() for row in rows} - {1}
    if len(widths) > 1:
        raise ValueError(
            f"{name} must have values for the same number of chains at every step, got "
            f"{' and '.join(map(str, sorted(widths)))}"
        )
    width = max(widths, default=1)
    return torch.stack([row.expand(width) for row in rows])


def per_chain(name: str, value: float | Tensor | Sequence[float]) -> Coefficient:
    """A non-negative float, or (B,) values as a (1, B) coefficient; TypeError or ValueError."""
    if isinstance(value, (Tensor, list, tuple)):
        value = _table(name, value)
        if value.ndim > 1:
            raise ValueError(f"{name} must be a number or (B,), got shape {tuple(value.shape)}")
        return coefficient(name, value.reshape(1, -1), 1)
    return check_number(name, value, minimum=0.0)


def chain_counts(values: Mapping[str, Coefficient]) -> dict[str, int]:
    """For each option that has values per chain, for how many; ValueError where these differ."""
    counts = {name: columns(value) for name, value in values.items() if columns(value) > 1}
    if len(set(counts.values())) > 1:
        given = " and ".join(f"{name} for {count}" for name, count in counts.items())
        raise ValueError(f"values per chain must be for the same number of chains, got {given}")
    return counts


def with_last_row(value: Coefficient, n_steps: int, last: Coefficient) -> Coefficient:
    """The table of T + 1 steps whose last has a value of its own."""
    tables = [torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (value, last)]
    width = max(map(columns, (value, last)))
    rows = zip(tables, (n_steps, 1), strict=True)
    return torch.cat([table.expand(count, width) for table, count in rows])


def sqrt(value: Coefficient) -> Coefficient:
    """Elementwise square root."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def columns(value: Coefficient) -> int:
    """For how many chains there are values: 1 where they are the same for all."""
    return value.shape[1] if isinstance(value, Tensor) else 1


def is_off(value: Coefficient) -> bool:
    """Whether it is the number 0, so that a step has no such term."""
    return not isinstance(value, Tensor) and value == 0


def place(name: str, value: Coefficient, *xs: Tensor) -> Coefficient:
    """The coefficient on the device of a state, in the widest dtype that its steps compute in.

    One that was made in inference mode is copied: autograd refuses to go past it.

    Raises:
        ValueError: a value of the option ``name`` is not finite in that dtype; or a table lies in
            the host's memory, and the stream is being captured.
    """
    largest = value
    if isinstance(value, Tensor):
        largest = float(value.detach().amax()) if value.numel() else 0.0
    if not largest <= _LARGEST_FLOAT and widest(xs) == torch.float32:
        raise ValueError(f"{name} must be finite in float32, got {largest:g}")
    if not isinstance(value, Tensor):
        return value
    check_can_copy(name, value, xs[0])
    # Without waiting for the device: what leaves the host's memory has been read when this returns.
    placed = value.to(xs[0].device, widest(xs), non_blocking=True)
    return placed.clone() if placed.is_inference() else placed
