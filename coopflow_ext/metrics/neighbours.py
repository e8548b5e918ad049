"""Nearest training neighbours: to show that samples are not copies."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_neighbours(x: Tensor, training: Tensor, *, batch_size: int = 256) -> Tensor:
    """Index of the training event at the smallest L2 distance of each row, and that distance.

    Args:
        x: (n, …).
        training: (N, …), decoded like x.
        batch_size: rows of x handled at once.

    Returns:
        (n, 2) float64: index, distance.
    """
    flat = training.flatten(1)
    rows = []
    for part in x.flatten(1).split(batch_size):
        # Products of matrices would be faster, and give copies a distance.
        distance, index = torch.cdist(part, flat, compute_mode="donot_use_mm_for_euclid_dist").min(
            1
        )
        rows.append(torch.stack((index.double(), distance.double()), 1))
    return torch.cat(rows)
