"""Energies in closed form, each with its score ∇log p = −∇U. x is (B, D), floating point.

TypeError for an x that is something else, ValueError for one of another shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from coopflow_ext._tensors import check_tensor


def _check_vectors(x: Tensor, min_dim: int = 1) -> None:
    check_tensor("x", x)
    if x.ndim != 2 or x.shape[1] < min_dim:
        raise ValueError(f"x must be (B, D) with D ≥ {min_dim}, got {tuple(x.shape)}")


class GaussianMixtureEnergy(nn.Module):
    """U(x) = −log Σ_k w_k N(x; μ_k, diag(σ_k²)), normalised: exp(−U) integrates to one.

    Args:
        means: (K, D).
        stds: a number, or a tensor that broadcasts to (K, D); positive.
        weights: (K,) non-negative, scaled to sum one; equal weights by default.

    Raises:
        ValueError: for shapes that do not fit, a std ≤ 0, or a negative weight.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor

    def __init__(
        self, means: Tensor, stds: Tensor | float = 1.0, weights: Tensor | None = None
    ) -> None:
        super().__init__()
        means = torch.as_tensor(means)
        if means.ndim != 2:
            raise ValueError(f"means must be (K, D), got shape {tuple(means.shape)}")
        stds = torch.as_tensor(stds, dtype=means.dtype)
        if not bool((stds > 0).all()):
            raise ValueError("stds must be positive")
        if weights is None:
            weights = means.new_ones(means.shape[0])
        weights = torch.as_tensor(weights, dtype=means.dtype)
        if weights.shape != means.shape[:1] or bool((weights < 0).any()) or weights.sum() <= 0:
            raise ValueError(
                f"weights must be {means.shape[0]} non-negative numbers of positive sum, "
                f"got shape {tuple(weights.shape)}"
            )
        self.register_buffer("means", means.clone())
        self.register_buffer("stds", stds.expand_as(means).clone())
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def _components(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(μ_k − x)/σ_k, (K, D, B), and log w_k N(x; μ_k, σ_k²), (K, B).

        The batch is the innermost dimension: with K or D there, torch's loops are short and slow.
        """
        check_tensor("x", x)
        dim = self.means.shape[1]
        if x.ndim != 2 or x.shape[1] != dim:
            raise ValueError(f"x must be (B, {dim}), got {tuple(x.shape)}")
        offsets = (self.means[..., None] - x.T.contiguous()) / self.stds[..., None]
        log_norm = self.stds.log().sum(1) + 0.5 * dim * math.log(2 * math.pi)
        log_probs = (self.log_weights - log_norm)[:, None] - 0.5 * offsets.square().sum(1)
        return offsets, log_probs

    def forward(self, x: Tensor) -> Tensor:
        return -self._components(x)[1].logsumexp(0)

    def score(self, x: Tensor) -> Tensor:
        """∇log p(x), (B, D)."""
        offsets, log_probs = self._components(x)
        pull = offsets / self.stds[..., None]
        return (log_probs.softmax(0)[:, None] * pull).sum(0).T.contiguous()


class DoubleWellEnergy(nn.Module):
    """U(x) = barrier_height · Σ_i (x_i² − 1)²: wells at ±1 in every coordinate."""

    def __init__(self, barrier_height: float = 2.0) -> None:
        super().__init__()
        self.barrier_height = barrier_height

    def forward(self, x: Tensor) -> Tensor:
        _check_vectors(x)
        return self.barrier_height * (x.square() - 1).square().sum(1)

    def score(self, x: Tensor) -> Tensor:
        """∇log p(x), (B, D)."""
        _check_vectors(x)
        return -4 * self.barrier_height * x * (x.square() - 1)


class RastriginEnergy(nn.Module):
    """U(x) = a·D + Σ_i (x_i² − a·cos 2πx_i): a bowl full of local minima, the lowest at 0."""

    def __init__(self, a: float = 10.0) -> None:
        super().__init__()
        self.a = a

    def forward(self, x: Tensor) -> Tensor:
        _check_vectors(x)
        return (self.a + x.square() - self.a * torch.cos(2 * math.pi * x)).sum(1)

    def score(self, x: Tensor) -> Tensor:
        """∇log p(x), (B, D)."""
        _check_vectors(x)
        return -2 * x - 2 * math.pi * self.a * torch.sin(2 * math.pi * x)


class RosenbrockEnergy(nn.Module):
    """U(x) = Σ_i b·(x_{i+1} − x_i²)² + (a − x_i)², D ≥ 2: a curved, narrow valley."""

    def __init__(self, a: float = 1.0, b: float = 100.0) -> None:
        super().__init__()
        self.a = a
        self.b = b

    def forward(self, x: Tensor) -> Tensor:
        _check_vectors(x, min_dim=2)
        head, tail = x[:, :-1], x[:, 1:]
        return (self.b * (tail - head.square()).square() + (self.a - head).square()).sum(1)

    def score(self, x: Tensor) -> Tensor:
        """∇log p(x), (B, D)."""
        _check_vectors(x, min_dim=2)
        head, tail = x[:, :-1], x[:, 1:]
        ridge = tail - head.square()
        score = torch.zeros_like(x)
        score[:, :-1] = 4 * self.b * head * ridge + 2 * (self.a - head)
        score[:, 1:] -= 2 * self.b * ridge
        return score
