"""Sampling a density in the plane, with a picture of the samples on its contours.

python examples/density_2d.py [--smoke] [--out density_2d.png]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

import coopflow_ext as cf
from coopflow_ext.energies import GaussianMixtureEnergy


def ring_of_gaussians() -> GaussianMixtureEnergy:
    angle = torch.arange(8) * (math.pi / 4)
    return GaussianMixtureEnergy(2 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a second or two of everything")
    parser.add_argument("--out", type=Path, default=Path("density_2d.png"))
    args = parser.parse_args()
    energy = ring_of_gaussians()
    key = cf.Key(0)
    start = cf.ops.normal((2000, 2), key.fold_in(1).tensor()) * 2
    sampler = cf.LangevinSampler(
        score=energy.score, n_steps=50 if args.smoke else 500, step_size=0.1
    )
    x = sampler(start, key=key).x
    assert isinstance(x, torch.Tensor)

    axis = torch.linspace(-3.2, 3.2, 200)
    grid = torch.cartesian_prod(axis, axis)
    density = torch.exp(-energy(grid)).reshape(200, 200).T
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.contour(axis, axis, density, levels=6, colors="0.6", linewidths=0.8)
    axes.scatter(*x.T, s=2)
    axes.set_aspect("equal")
    figure.savefig(args.out, dpi=120)
    nearest = torch.cdist(x, energy.means).argmin(1)
    counts = torch.bincount(nearest, minlength=8).tolist()
    print(f"samples at each of the 8 modes: {counts}; picture: {args.out}")


if __name__ == "__main__":
    main()
