"""Fréchet distance between Gaussians fitted to features, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (D,) and unbiased covariance (D, D) of n feature vectors, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor
    n: int

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of the rows of ``features`` (n, D), n ≥ 2.

        Raises:
            ValueError: for another shape, or a feature that is not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features must be (n ≥ 2, D), got {tuple(features.shape)}")
        features = features.detach().to("cpu", torch.float64)
        if not bool(features.isfinite().all()):
            raise ValueError("features must be finite")
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))


def _roots(eigenvalues: Tensor) -> Tensor:
    """Of the eigenvalues of a positive semi-definite matrix; 0 where one is 0 but for rounding,
    whose root would be far from that."""
    rounding = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.amax()
    return torch.where(eigenvalues > rounding, eigenvalues, 0.0).sqrt()


def _sqrt_psd(matrix: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * _roots(values) @ vectors.T
    return root


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½), the squared 2-Wasserstein distance.

    The trace of the root is taken of Σ_a^½ Σ_b Σ_a^½, which has the same eigenvalues and is
    symmetric, so singular covariances need no offset. A small number of samples biases the
    distance upwards: compare only distances from equal numbers.

    Source: D. C. Dowson, B. V. Landau, J. Multivariate Analysis 12 (1982).
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"both statistics must have one dimension, got {len(a.mean)} and {len(b.mean)}"
        )
    root = _sqrt_psd(a.covariance)
    cross = _roots(torch.linalg.eigvalsh(root @ b.covariance @ root)).sum()
    trace = a.covariance.trace() + b.covariance.trace() - 2 * cross
    return float((a.mean - b.mean).square().sum() + trace)
