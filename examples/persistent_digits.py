"""An energy trained on scanned digits with persistent chains (a replay buffer), no flow.

python examples/persistent_digits.py [--smoke] [--out persistent_digits.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext import data
from coopflow_ext.coop.pictures import save_panels
from coopflow_ext.energies import MLPEnergy


def train(images: Tensor, n_iterations: int) -> tuple[cf.ReplayBuffer, list[float]]:
    """The buffer after training, and the gap U(chains) − U(data) on the way."""
    energy = MLPEnergy(images[0].numel(), widths=(128, 128, 128))
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3, betas=(0.5, 0.9))
    sampler = cf.LangevinSampler(
        energy, n_steps=30, drift=0.125, noise=0.02, step_clip=0.1, clamp=(-1, 1)
    )
    key = cf.Key(0)
    buffer = cf.ReplayBuffer(images.shape[1:], size=2000, reinit_probability=0.05, key=key)
    gaps = []
    for step in range(n_iterations):
        real = images[torch.randint(len(images), (128,))]
        start, indices = buffer.draw(128)
        out = sampler(start, key=key)
        key = out.key
        assert isinstance(out.x, Tensor)
        buffer.write(indices, out.x)
        u_real, u_chain = energy(real), energy(out.x)
        # Energies stay near zero, or their difference could grow without bound.
        loss = (u_real - u_chain).mean() + 0.01 * (u_real.square() + u_chain.square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gaps.append((u_chain - u_real).mean().item())
        if step % 200 == 0:
            print(f"step {step}: U(chains) - U(data) = {gaps[-1]:+.3f}")
    return buffer, gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a second or two of everything")
    parser.add_argument("--out", type=Path, default=Path("persistent_digits.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    digits = data.load("digits")
    images = digits.decode(digits.train).reshape(-1, 1, 8, 8)
    buffer, _ = train(images, 20 if args.smoke else 2000)
    save_panels(args.out, {"data": images[:64], "persistent chains": buffer.states[:64]})
    distance = (images.mean(0) - buffer.states.mean(0)).norm().item()
    print(f"distance of the pixel means: {distance:.2f}; picture: {args.out}")


if __name__ == "__main__":
    main()
