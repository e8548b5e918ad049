"""Densities in the plane whose true value is known, to see what a model learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext.data.dataset import Dataset
from coopflow_ext.rng import Key

_DATA_KEY = Key(2)
_N_TRAIN, _N_HELD_OUT = 20_000, 4_000
EXTENT = 4.0  # all of them lie in [−4, 4]², but for tails of less than 1e-3


@dataclass(frozen=True)
class ToyDensity:
    """A distribution on the plane.

    Attributes:
        draw: uniforms and normals, (n, 4) in (0, 1) and (n, 2) → n points (n, 2).
        log_density: points (n, 2) → log p, (n,), float64.
    """

    draw: Callable[[Tensor, Tensor], Tensor]
    log_density: Callable[[Tensor], Tensor]

    def sample(self, n: int, key: Key) -> Tensor:
        """n points (n, 2), float32, in [−4, 4]² (points outside are brought to the border)."""
        uniform_key, normal_key = key.split(2)
        u = ops.uniform((n, 4), uniform_key.tensor("cpu"), dtype=torch.float64)
        e = ops.normal((n, 2), normal_key.tensor("cpu"), dtype=torch.float64)
        return self.draw(u, e).clamp(-EXTENT, EXTENT).float()


def _mixture(
    centres: Callable[[Tensor, Tensor], Tensor], std: float, *, branches: int, points: int
) -> ToyDensity:
    """Gaussian noise around points of a curve: ``centres(t, v)`` for t and v uniform in (0, 1).

    The density is the integral over the curve, by the midpoint rule with so many ``points`` in t
    for every one of the ``branches`` in v.
    """

    def draw(u: Tensor, e: Tensor) -> Tensor:
        return centres(u[:, 0], u[:, 1]) + std * e

    def log_density(x: Tensor) -> Tensor:
        like: dict[str, Any] = {"dtype": torch.float64, "device": x.device}
        t = (torch.arange(points, **like) + 0.5) / points
        v = (torch.arange(branches, **like) + 0.5) / branches
        mu = centres(t.repeat(branches), v.repeat_interleave(points))
        parts = [
            torch.logsumexp(-torch.cdist(p, mu).square() / (2 * std**2), 1)
            for p in x.double().split(2000)
        ]
        return torch.cat(parts) - math.log(len(mu) * 2 * math.pi * std**2)

    return ToyDensity(draw, log_density)


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)


def _eight_gaussians(t: Tensor, v: Tensor) -> Tensor:
    return _polar(2.83, (v * 8).floor() * (math.pi / 4))


def _two_spirals(t: Tensor, v: Tensor) -> Tensor:
    angle = t.sqrt() * 3 * math.pi
    sign = torch.where(v < 0.5, 1.0, -1.0)
    return sign[:, None] * torch.stack((-angle.cos() * angle, angle.sin() * angle), -1) / 3


def _moons(t: Tensor, v: Tensor) -> Tensor:
    arc = _polar(1.0, t * math.pi)
    other = torch.tensor([1.0, 0.5], dtype=t.dtype, device=t.device) - arc
    both = torch.where((v < 0.5)[:, None], arc, other)
    return 1.8 * (both - torch.tensor([0.5, 0.25], dtype=t.dtype, device=t.device))


def _rings(t: Tensor, v: Tensor) -> Tensor:
    return _polar(0.75 * ((v * 4).floor() + 1), t * 2 * math.pi)


def _checkerboard() -> ToyDensity:
    """Uniform on the dark squares, of side 2, of a 4×4 board."""

    def draw(u: Tensor, e: Tensor) -> Tensor:
        x = u[:, 0] * 8 - 4
        row = (u[:, 1] * 2).floor() * 2 + (x / 2).floor() % 2
        return torch.stack((x, (row - 2) * 2 + u[:, 2] * 2), -1)

    def log_density(points: Tensor) -> Tensor:
        p = points.double()
        dark = ((p / 2).floor().sum(1) % 2 == 0) & (p.abs() < EXTENT).all(1)
        return torch.where(dark, -math.log(32.0), -math.inf)

    return ToyDensity(draw, log_density)


def _pinwheel() -> ToyDensity:
    """Five blades N((1.6, 0), diag(0.5², 0.13²)), rotated by 2πk/5 + 0.5·radius.

    A rotation by an angle that depends on the radius alone keeps areas, so the density is that of
    the unrotated point.
    """
    mean = torch.tensor([1.6, 0.0], dtype=torch.float64)
    std = torch.tensor([0.5, 0.13], dtype=torch.float64)

    def rotate(points: Tensor, angle: Tensor) -> Tensor:
        x, y = points.unbind(-1)
        c, s = angle.cos(), angle.sin()
        return torch.stack((c * x - s * y, s * x + c * y), -1)

    def draw(u: Tensor, e: Tensor) -> Tensor:
        blade = mean + std * e
        angle = (u[:, 0] * 5).floor() * (2 * math.pi / 5) + 0.5 * blade.norm(dim=1)
        return rotate(blade, angle)

    def log_density(points: Tensor) -> Tensor:
        p = points.double()
        logs = []
        for k in range(5):
            blade = rotate(p, -(2 * math.pi * k / 5 + 0.5 * p.norm(dim=1)))
            squares = ((blade - mean) / std).square().sum(1)
            logs.append(-0.5 * squares - math.log(2 * math.pi) - std.log().sum())
        return torch.logsumexp(torch.stack(logs), 0) - math.log(5)

    return ToyDensity(draw, log_density)


DENSITIES: dict[str, ToyDensity] = {
    "8gaussians": _mixture(_eight_gaussians, 0.35, branches=8, points=1),
    "2spirals": _mixture(_two_spirals, 0.12, branches=2, points=600),
    "checkerboard": _checkerboard(),
    "moons": _mixture(_moons, 0.18, branches=2, points=150),
    "pinwheel": _pinwheel(),
    "rings": _mixture(_rings, 0.1, branches=4, points=200),
}


def toy(name: str) -> Dataset:
    """20,000 training and 4,000 held-out points of a density, (2,) float32.

    Raises:
        ValueError: for a name that is not in ``DENSITIES``.
    """
    if name not in DENSITIES:
        raise ValueError(f"toy must be one of {', '.join(DENSITIES)}, got {name!r}")
    points = DENSITIES[name].sample(_N_TRAIN + _N_HELD_OUT, _DATA_KEY)
    return Dataset(f"toy:{name}", points[:_N_TRAIN], points[_N_TRAIN:], None)
