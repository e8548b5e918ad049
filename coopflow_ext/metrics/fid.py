"""The standard FID: Inception features, by torchmetrics with torch-fidelity."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from coopflow_ext._optional import require


def check_installed() -> None:
    """ImportError, with what to install, unless the Inception network can be had."""
    require("torchmetrics.image.fid", extra="fid", distribution="torchmetrics")
    require("torch_fidelity", extra="fid", distribution="torch-fidelity")


def to_bytes(x: Tensor) -> Tensor:
    """Images in [−1, 1] → uint8 with three channels, as they would be in a PNG."""
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.expand(-1, 3, -1, -1)


def fid(
    real: Iterable[Tensor],
    generated: Iterable[Tensor],
    *,
    features: int | nn.Module = 2048,
    device: torch.device | str = "cpu",
) -> float:
    """Fréchet inception distance between two streams of image batches in [−1, 1].

    Args:
        real: batches (B, C, H, W) of training images.
        generated: batches of samples.
        features: 2048 for the Inception network, whose weights torch-fidelity fetches; or a module
            that maps uint8 (B, 3, H, W) to features (B, d).
        device: where the features are computed.

    Raises:
        ImportError: torchmetrics or torch-fidelity is missing.
    """
    if isinstance(features, int):
        check_installed()
    module = require("torchmetrics.image.fid", extra="fid", distribution="torchmetrics")
    metric = module.FrechetInceptionDistance(feature=features, normalize=False).to(device)
    for batches, is_real in ((real, True), (generated, False)):
        for batch in batches:
            metric.update(to_bytes(batch).to(device), real=is_real)
    return float(metric.compute())
