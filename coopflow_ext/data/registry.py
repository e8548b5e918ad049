"""Data sets by the name that the command line knows."""

from __future__ import annotations

from collections.abc import Callable

from coopflow_ext.data.bundled import digits, patches
from coopflow_ext.data.dataset import Dataset

_BUNDLED: dict[str, Callable[[], Dataset]] = {"digits": digits, "patches": patches}

NAMES = tuple(_BUNDLED)


def load(name: str) -> Dataset:
    """The data set of that name.

    Raises:
        ValueError: for a name that is not in ``NAMES``.
        ImportError: when the package that holds it is missing; the message says what to install.
    """
    if name not in _BUNDLED:
        raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
    return _BUNDLED[name]()
