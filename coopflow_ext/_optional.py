"""Packages that only some parts need: imported where they are used, with a clear message."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str) -> Any:
    """Import ``module``; None where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        return None


def require(module: str, *, extra: str, distribution: str | None = None) -> Any:
    """Import ``module`` or say how to get it.

    Args:
        module: dotted name to import.
        extra: the extra of this package that brings it.
        distribution: its name on the package index, where it differs from the module's.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    found = optional(module)
    if found is None:
        name = distribution or module.partition(".")[0]
        raise ImportError(
            f"{name} is needed for this: pip install 'coopflow-ext[{extra}]' (or {name})"
        )
    return found
