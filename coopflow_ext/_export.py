"""Whether a program is exported."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which torch 2.10 and 2.11 answer with yes in all code that
    torch.compile traces; what it reads elsewhere, and later versions read everywhere, is right."""
    return bool(torch.compiler._is_exporting_flag)
