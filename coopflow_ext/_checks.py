"""Plain values that are refused: each helper raises TypeError or ValueError and names the
argument, what came and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str, value: object, *, minimum: float = -math.inf, exclusive: bool = False
) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite, below ``minimum``, or equal to it when ``exclusive``.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or number < minimum or (exclusive and number == minimum):
        bound = f"{'>' if exclusive else '≥'} {minimum:g}"
        allowed = bound if math.isfinite(number) else "finite"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return number


def check_probability(name: str, value: object) -> float:
    """``value`` as a float in [0, 1), as a dropout's; TypeError or ValueError otherwise."""
    probability = check_number(name, value)
    if not 0 <= probability < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return probability


def check_count(name: str, value: object, minimum: int) -> int:
    """``value`` as an int ≥ minimum; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be ≥ {minimum}, got {value}")
    return int(value)


def check_counts(minimum: int, **values: object) -> None:
    """:func:`check_count` of each, by name."""
    for name, value in values.items():
        check_count(name, value, minimum)


def check_sequence(name: str, value: object, of: str) -> Sequence[Any]:
    """``value``, which must be a list, a tuple or the like; TypeError otherwise."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of {of}, got {type(value).__name__}")
    return value


def check_sizes(name: str, value: object, minimum: int = 1) -> tuple[int, ...]:
    """``value``, a sequence of ints ≥ minimum, as a tuple; TypeError or ValueError otherwise."""
    sizes = check_sequence(name, value, "ints")
    return tuple(check_count(f"{name}[{i}]", size, minimum) for i, size in enumerate(sizes))


def check_flag(name: str, value: object) -> bool:
    """``value``, which must be True or False; TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_flags(**values: object) -> None:
    """:func:`check_flag` of each, by name."""
    for name, value in values.items():
        check_flag(name, value)


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """ValueError unless value is one of ``allowed``."""
    plain = isinstance(value, (str, int))  # a tensor cannot be compared
    names = [choice for choice in allowed if not isinstance(choice, bool)]  # 1 is not True
    if not any(value is choice for choice in allowed) and not (plain and value in names):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
