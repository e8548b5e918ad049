"""An existing EBM loop (JEM's), before and after one change, with the time of both.

python examples/jem_loop.py [--smoke]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext.energies import MLPEnergy

N_STEPS = 20


def sample_before(energy: nn.Module, x: Tensor) -> Tensor:
    """As such loops are written."""
    x = x.clone().requires_grad_()
    for _ in range(N_STEPS):
        grad = torch.autograd.grad(energy(x).sum(), [x], retain_graph=True)[0]
        x.data += -grad + 0.01 * torch.randn_like(x)
    return x.detach()


def make_sample_after(energy: nn.Module) -> cf.LangevinSampler:
    """The change: made once, then called in place of the loop."""
    return cf.LangevinSampler(energy, n_steps=N_STEPS, drift=1.0, noise=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a second or two of everything")
    repeats = 3 if parser.parse_args().smoke else 30
    torch.manual_seed(0)
    energy, x0 = MLPEnergy(64), torch.rand(256, 64) * 2 - 1
    sampler = make_sample_after(energy)

    def before() -> Tensor:
        return sample_before(energy, x0)

    def after() -> Tensor:
        x = sampler(x0).x
        assert isinstance(x, Tensor)
        return x

    # The same law of x: here the mean energy after the chain.
    means = [energy(sample()).mean().item() for sample in (before, after)]
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(repeats):
        for name, sample in (("before", before), ("after", after)):
            begin = time.perf_counter()
            sample()
            seconds[name].append(time.perf_counter() - begin)
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    print(f"mean energy after the chain: before {means[0]:.4f}, after {means[1]:.4f}")
    print(f"before {ms['before']:.2f} ms, after {ms['after']:.2f} ms a chain")


if __name__ == "__main__":
    main()
