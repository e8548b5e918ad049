"""Energies in closed form, each with its score ∇log p = −∇U. x is (B, D), floating point.

TypeError for an x that is something else, ValueError for one of another shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from coopflow_ext._checks import check_count, check_number
from coopflow_ext._tensors import as_tensor, check_tensor


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
        means = as_tensor("means", means)
        if means.ndim != 2 or not means.is_floating_point():
            raise ValueError(
                f"means must be (K, D), floating point, got {means.dtype} of shape "
                f"{tuple(means.shape)}"
            )
        stds = as_tensor("stds", stds, dtype=means.dtype, device=means.device)
        if not bool((stds > 0).all()):
            raise ValueError("stds must be positive")
        try:
            stds = stds.expand_as(means)
        except RuntimeError as error:
            raise ValueError(
                f"stds must broadcast to the shape of means {tuple(means.shape)}, got shape "
                f"{tuple(stds.shape)}"
            ) from error
        if weights is None:
            weights = means.new_ones(means.shape[0])
        weights = as_tensor("weights", weights, dtype=means.dtype, device=means.device)
        if weights.shape != means.shape[:1] or bool((weights < 0).any()) or weights.sum() <= 0:
            raise ValueError(
                f"weights must be {means.shape[0]} non-negative numbers of positive sum, "
                f"got shape {tuple(weights.shape)}"
            )
        self.register_buffer("means", means.clone())
        self.register_buffer("stds", stds.clone())
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


class GaussianEnergy(nn.Module):
    """U(x) = −log N(x; mean, covariance), normalised: exp(−U) integrates to one.

    Args:
        mean: (D,).
        covariance: (D, D), symmetric and positive definite.

    Buffers: mean, ``precision`` = covariance⁻¹ and ``log_norm`` = ½ log det(2π covariance).

    Raises:
        ValueError: for shapes that do not fit, or a covariance that is not symmetric and positive
            definite.
    """

    mean: Tensor
    precision: Tensor
    log_norm: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        mean = as_tensor("mean", mean)
        if mean.ndim != 1 or not len(mean) or not mean.is_floating_point():
            raise ValueError(
                f"mean must be (D,), floating point, got {mean.dtype} of shape {tuple(mean.shape)}"
            )
        covariance = as_tensor("covariance", covariance, device=mean.device)
        dim = len(mean)
        if covariance.shape != (dim, dim):
            raise ValueError(f"covariance must be ({dim}, {dim}), got {tuple(covariance.shape)}")
        wide = covariance.double()
        factor, failed = torch.linalg.cholesky_ex(wide)
        if bool(failed) or not torch.allclose(wide, wide.T, rtol=1e-5, atol=0.0):
            raise ValueError("covariance must be symmetric and positive definite")
        log_norm = factor.diagonal().log().sum() + 0.5 * dim * math.log(2 * math.pi)
        self.register_buffer("mean", mean.clone())
        precision = torch.cholesky_inverse(factor).to(mean.dtype).contiguous()
        self.register_buffer("precision", precision)
        self.register_buffer("log_norm", log_norm.to(mean.dtype))

    def _offsets(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"x must be (B, {len(self.mean)}), got {tuple(x.shape)}")
        return x - self.mean

    def forward(self, x: Tensor) -> Tensor:
        offsets = self._offsets(x)
        return 0.5 * (offsets * self._pull(offsets)).sum(1) + self.log_norm

    def score(self, x: Tensor) -> Tensor:
        """∇log p(x), (B, D)."""
        return -self._pull(self._offsets(x))

    def _pull(self, offsets: Tensor) -> Tensor:
        return offsets @ self.precision.to(offsets.dtype)


class FunnelEnergy(nn.Module):
    """Neal's funnel, normalised: v = x₀ ~ N(0, scale²), and x₁ … x_{D−1} ~ N(0, e^v) given v.

    Args:
        dim: D ≥ 2.
        scale: standard deviation of v, > 0.

    Raises:
        ValueError: for a dim below 2, or a scale that is not positive and finite.
    """

    def __init__(self, dim: int, scale: float = 3.0) -> None:
        super().__init__()
        self.dim = check_count("dim", dim, 2)
        self.scale = check_number("scale", scale, minimum=0, exclusive=True)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """v, (B,), and the others, (B, D − 1)."""
        check_tensor("x", x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be (B, {self.dim}), got {tuple(x.shape)}")
        return x[:, 0], x[:, 1:]

    def forward(self, x: Tensor) -> Tensor:
        v, rest = self._split(x)
        u_of_v = 0.5 * (v / self.scale).square() + math.log(self.scale)
        u_of_rest = 0.5 * (rest.square().sum(1) * (-v).exp() + (self.dim - 1) * v)
        return u_of_v + u_of_rest + 0.5 * self.dim * math.log(2 * math.pi)

    def score(self, x: Tensor) -> Tensor:
        """∇log p(x), (B, D)."""
        v, rest = self._split(x)
        precision = (-v).exp()
        of_v = 0.5 * (rest.square().sum(1) * precision - (self.dim - 1)) - v / self.scale**2
        return torch.cat((of_v[:, None], -rest * precision[:, None]), dim=1)


class DoubleWellEnergy(nn.Module):
    """U(x) = barrier_height · Σ_i (x_i² − 1)²: wells at ±1 in every coordinate."""

    def __init__(self, barrier_height: float = 2.0) -> None:
        super().__init__()
        self.barrier_height = check_number("barrier_height", barrier_height)

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
        self.a = check_number("a", a)

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
        self.a = check_number("a", a)
        self.b = check_number("b", b)

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
