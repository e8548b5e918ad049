"""The same work on several numbers of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def by_threads(run: Callable[[], T], counts: tuple[int, ...] = (1, 2, 7)) -> list[T]:
    """What it returns on each number of torch's threads, which are restored afterwards."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results
