"""A torchebm energy with our sampler: only the import changes.

pip install torchebm
python examples/torchebm_energy.py [--smoke]
"""

from __future__ import annotations

import argparse

import torch
from torchebm.core import DoubleWellModel

from coopflow_ext.integrations.torchebm import LangevinDynamics  # was: torchebm.samplers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a second or two of everything")
    n_steps = 100 if parser.parse_args().smoke else 1000
    energy = DoubleWellModel(barrier_height=2.0)
    sampler = LangevinDynamics(energy, step_size=0.01, noise_scale=1.0)
    samples, diagnostics = sampler.sample(
        dim=2, n_samples=1000, n_steps=n_steps, thin=n_steps // 10, return_diagnostics=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert isinstance(samples, torch.Tensor)
    print("mean energy on the way:", [round(u, 2) for u in diagnostics["energy"].tolist()])
    print(f"mean |x| = {samples.abs().mean():.3f} (the wells are at 1)")


if __name__ == "__main__":
    main()
