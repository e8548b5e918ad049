"""The standard FID: Inception features, by torchmetrics with torch-fidelity."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from coopflow_ext._optional import require
from coopflow_ext.data.dataset import to_bytes
from coopflow_ext.metrics.frechet import FeatureStatistics, frechet_distance


def check_inception_installed() -> None:
    """ImportError, with what to install, unless the Inception network can be had."""
    try:
        require("torchmetrics.image.fid", extra="fid", distribution="torchmetrics")
        require("torch_fidelity", extra="fid", distribution="torch-fidelity")
    except Exception as error:  # a torchvision made for another torch raises RuntimeError
        if isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError):
            raise
        raise ImportError(
            "FID needs torchmetrics and torch-fidelity, and a torchvision made for this torch "
            f"{torch.__version__}; they cannot be imported: {error}"
        ) from error


def read_statistics(path: Path) -> FeatureStatistics:
    """Mean and covariance of features from an .npz file with ``mu`` (d,) and ``sigma`` (d, d).

    That is the format of pytorch-fid's ``--save-stats``; how many images they are of is not in it,
    so ``n`` is 0.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            mean, covariance = (
                torch.from_numpy(content[k].astype(np.float64, casting="safe"))
                for k in ("mu", "sigma")
            )
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        raise ValueError(
            f"fid_stats {path} cannot be read as an .npz file with mu and sigma: {error}"
        ) from error
    if not bool(mean.isfinite().all() & covariance.isfinite().all()):
        raise ValueError(f"fid_stats {path} must be finite")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"fid_stats {path} must hold mu (d,) and sigma (d, d), got {tuple(mean.shape)} and "
            f"{tuple(covariance.shape)}"
        )
    if not torch.allclose(covariance, covariance.T):
        raise ValueError(f"fid_stats {path} must have a symmetric sigma")
    return FeatureStatistics(mean, covariance, 0)


def fid(
    real: Iterable[Tensor] | FeatureStatistics,
    generated: Iterable[Tensor],
    *,
    features: int | nn.Module = 2048,
    device: torch.device | str = "cpu",
) -> float:
    """Fréchet inception distance between two streams of image batches in [−1, 1].

    Args:
        real: batches (B, C, H, W) of training images, or the statistics of their features.
        generated: batches of samples.
        features: 2048 for the Inception network, whose weights torch-fidelity fetches; or a module
            that maps uint8 (B, 3, H, W) to features (B, d).
        device: where the features are computed.

    Raises:
        ImportError: torchmetrics or torch-fidelity is missing.
        ValueError: the statistics are of another number of features.
    """
    if isinstance(features, int):
        check_inception_installed()
    module = require("torchmetrics.image.fid", extra="fid", distribution="torchmetrics")
    metric = module.FrechetInceptionDistance(feature=features, normalize=False).to(device)
    if isinstance(real, FeatureStatistics):
        rows = [metric.inception(to_bytes(batch).to(device)).double().cpu() for batch in generated]
        return frechet_distance(real, FeatureStatistics.of(torch.cat(rows)))
    for batches, is_real in ((real, True), (generated, False)):
        for batch in batches:
            metric.update(to_bytes(batch).to(device), real=is_real)
    return float(metric.compute())
