"""Annealed Langevin sampling of a score in the plane, beside Langevin sampling of the same density.

Two Gaussians far apart, one of them four times as heavy. Chains of the density itself stay at the
one that they start near, so that half of them end at each. The score that knows its noise level
starts where both are one cloud, and the weights come out right.

python examples/annealed_score_2d.py [--smoke] [--out annealed_score_2d.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import coopflow_ext as cf

MEANS = torch.tensor([[-5.0, -5.0], [5.0, 5.0]])
WEIGHTS = torch.tensor([0.2, 0.8])


def score(x: Tensor, sigma: Tensor) -> Tensor:
    """∇log of the density, of standard deviation 1 at each mean, smeared by noise of sigma."""
    variance = 1 + sigma**2
    away = MEANS - x[:, None]
    log_density = WEIGHTS.log() - away.square().sum(-1) / (2 * variance)
    return (log_density.softmax(1)[..., None] * away).sum(1) / variance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a second or two of everything")
    parser.add_argument("--out", type=Path, default=Path("annealed_score_2d.png"))
    args = parser.parse_args()
    n_chains, n_steps_each = (1000, 30) if args.smoke else (2000, 200)
    key = cf.Key(0)
    start = 8 * (2 * torch.rand(n_chains, 2, generator=torch.Generator().manual_seed(0)) - 1)

    levels = torch.logspace(1.2, -1, 12)  # of noise, from 16 to 0.1
    sigma = levels.repeat_interleave(n_steps_each)
    annealed = cf.LangevinSampler(
        score=score,
        n_steps=len(sigma),
        drift=0.1 * sigma**2,
        step_kwargs={"sigma": sigma},
        denoise=float(levels[-1] ** 2),
    )
    plain = cf.LangevinSampler(
        score=score,
        n_steps=len(sigma),
        drift=0.1,
        step_kwargs={"sigma": torch.zeros(len(sigma))},
    )
    ends = {"Langevin": plain(start, key=key).x, "annealed": annealed(start, key=key).x}

    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(1, 2, sharey=True), ends.items(), strict=True):
        assert isinstance(x, Tensor)
        share = (x.sum(1) > 0).float().mean().item()
        print(f"{name}: {share:.2f} of the chains at the heavier mode, which has {WEIGHTS[1]:.2f}")
        axes.scatter(*start.T, s=1, color="0.8")
        axes.scatter(*x.T, s=2)
        axes.set_title(f"{name}: {share:.2f} and {1 - share:.2f}")
        axes.set_aspect("equal")
    figure.savefig(args.out, dpi=120)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
