"""What torch.compile leaves to Python.

Traced code alone imports this: the decorator loads the compiler, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="call flow.initialize(x) before compiling: ActNorm looks at its first batch"
)
def start(starts: Callable[..., None], *args: Any) -> None:
    """``starts(*args)``, outside of the graph."""
    starts(*args)
