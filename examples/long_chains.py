"""Long chains with diagnostics: MALA with an adapted step size against unadjusted Langevin.

python examples/long_chains.py [--smoke] [--out long_chains.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext import diagnostics
from coopflow_ext.energies import DoubleWellEnergy


def report(name: str, trajectory: Tensor) -> None:
    """trajectory: (T, B, D), after warm-up."""
    n_steps, n_chains = trajectory.shape[:2]
    size, rhat = diagnostics.ess(trajectory), diagnostics.split_rhat(trajectory)
    lag = diagnostics.autocorrelation(trajectory, max_lag=1)[1].mean().item()
    print(
        f"{name}: {n_chains} chains of {n_steps}, effective size {size.min():.0f}, "
        f"split R-hat {rhat.max():.3f}, lag-1 autocorrelation {lag:.2f}, "
        f"E[x²] = {trajectory.square().mean():.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a second or two of everything")
    parser.add_argument("--out", type=Path, default=Path("long_chains.png"))
    args = parser.parse_args()
    n_steps = 200 if args.smoke else 5000
    warm_up = n_steps // 4
    energy = DoubleWellEnergy(barrier_height=1.0)
    x0 = cf.ops.uniform((64, 2), cf.Key(1).tensor()) * 2 - 1

    langevin = cf.LangevinSampler(
        energy, n_steps=n_steps, step_size=0.3, return_trajectory=True, stats=True
    )
    out = langevin(x0, key=cf.Key(0))
    assert isinstance(out.trajectory, Tensor)
    report("Langevin", out.trajectory[warm_up:])
    mala = cf.MALASampler(
        energy, n_steps=n_steps, step_size=0.3, adapt_steps=warm_up, return_trajectory=True,
        stats=True,
    )  # fmt: skip
    exact = mala(x0, key=cf.Key(0))
    assert exact.trajectory is not None
    assert exact.stats is not None
    report("MALA", exact.trajectory[warm_up:])
    print(
        f"MALA accepts {exact.stats.acceptance[warm_up:].mean():.2f} with step sizes "
        f"{exact.step_size.min():.2f} to {exact.step_size.max():.2f}"
    )
    grid = torch.linspace(-3, 3, 10_001, dtype=torch.float64)
    weight = torch.exp(-energy(grid[:, None]))
    print(f"quadrature: E[x²] = {(grid.square() * weight).sum() / weight.sum():.3f}")
    diagnostics.plot(out).savefig(args.out)
    print(f"traces: {args.out}")


if __name__ == "__main__":
    main()
