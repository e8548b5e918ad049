"""Whole chains of a fully connected energy in one kernel beside loops on the same network.

    pytest benchmarks/bench_mlp.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'mlp/*'

The plain loop takes its gradient by autograd and draws its noise into one buffer; the compiled one
has its gradient compiled. On CUDA both take part as CUDA graphs too. The sampler's call, with what
it checks and returns beside, is measured by the cases chain/MLP of bench_sampler.py. In the cases
of bfloat16 ours takes it between hidden layers, and the loops are under torch.autocast.

Before anything is timed, every contestant takes the same supplied normals, and moves by its drift
alone, from the same start; what is expected of them is a plain loop's in float32.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from harness import NOT_COMPILED, OURS, Case, Contest, add_graph, counted_flops, run_pytest
from torch import Tensor

from coopflow_ext import Key, ops, reference

DRIFT, NOISE = 0.005, 0.1
PLAIN, COMPILED = "plain loop", "compiled gradient"
GRAPH, COMPILED_GRAPH = "CUDA graph of plain loop", "CUDA graph of compiled gradient"
KEY = Key(0)
Gradient = Callable[[Tensor], Tensor]


class Network:
    """Weights as torch's Linear is given them at first, chains' starts, the steps to make, and
    whether products may be taken in bfloat16."""

    def __init__(
        self, batch: int, d: int, widths: tuple[int, ...], n_steps: int, device: torch.device,
        *, bfloat16: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        sizes = (d, *widths, 1)
        layers = [torch.nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(sizes)]
        self.weights = [layer.weight.detach().to(device) for layer in layers]
        self.biases = [layer.bias.detach().to(device) for layer in layers]
        self.x0 = torch.randn(batch, d).to(device)
        self.n_steps = n_steps
        self.rng = KEY.tensor(device)
        self.bfloat16 = bfloat16

    def energy(self, x: Tensor) -> Tensor:
        with torch.autocast(
            x.device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=False
        ):
            u = reference.mlp_energy(x, self.weights, self.biases, activation="silu")
        return u.float().sum()

    def by_autograd(self, x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(self.energy(leaf), leaf)
        return grad

    def compiled(self) -> Gradient:
        gradient = torch.compile(torch.func.grad(self.energy), dynamic=False)
        return lambda x: gradient(x.detach())

    def ours(self, xi: Tensor | None = None) -> Tensor:
        return ops.mlp_langevin_chain(
            self.x0, self.weights, self.biases, self.rng, activation="silu",
            n_steps=self.n_steps, drift=DRIFT, noise=NOISE, xi=xi, freeze_nonfinite=True,
            bfloat16=self.bfloat16,
        ).x  # fmt: skip

    def loop(self, gradient: Gradient, xi: Tensor | None = None) -> Tensor:
        x, noise = self.x0.clone(), torch.empty_like(self.x0)
        for k in range(self.n_steps):
            x.add_(gradient(x), alpha=-DRIFT)
            x.add_(noise.normal_() if xi is None else xi[k], alpha=NOISE)
        return x


def check(network: Network, runs: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Against the plain loop with the same normals, and with none: noise hides a wrong drift."""
    shape = (network.n_steps, *network.x0.shape)
    exact = copy.copy(network)
    exact.bfloat16 = False
    bound = 3e-2 if network.bfloat16 else 1e-3
    for xi in (torch.randn(shape).to(network.x0), torch.zeros(shape).to(network.x0)):
        expected = exact.loop(exact.by_autograd, xi)
        moved = (expected - network.x0).norm()
        for name, run in runs.items():
            error = ((run(xi) - expected).norm() / moved).item()
            assert error <= bound, f"{name}: off by {error:.2g} of its way"


def case(
    batch: int, d: int, widths: tuple[int, ...], n_steps: int = 100, *, quick: bool = False,
    devices: tuple[str, ...] = ("cpu", "cuda"), bfloat16: bool = False,
) -> Case:  # fmt: skip
    def build(device: torch.device, with_compile: bool) -> Contest:
        network = Network(batch, d, widths, n_steps, device, bfloat16=bfloat16)
        gradients: dict[str, Gradient] = {PLAIN: network.by_autograd}
        missing: dict[str, str] = {}
        if with_compile:
            gradients[COMPILED] = network.compiled()
        else:
            missing[COMPILED] = NOT_COMPILED
        runs: dict[str, Callable[[], Any]] = {OURS: network.ours}
        runs |= {name: lambda g=g: network.loop(g) for name, g in gradients.items()}
        supplied: dict[str, Callable[[Tensor], Tensor]] = {OURS: network.ours}
        supplied |= {name: lambda xi, g=g: network.loop(g, xi) for name, g in gradients.items()}
        if device.type == "cuda":
            for graph, loop in ((GRAPH, PLAIN), (COMPILED_GRAPH, COMPILED)):
                if loop in runs:
                    add_graph(graph, runs[loop], runs, missing)
        return Contest(
            runs,
            lambda: check(network, supplied),
            missing=missing,
            flops=n_steps * counted_flops(lambda: network.by_autograd(network.x0)),
            own_memory=frozenset((GRAPH, COMPILED_GRAPH)),
        )

    name = f"mlp/{batch}x{d}/{'-'.join(map(str, widths))}{', bfloat16' if bfloat16 else ''}"
    return Case(name, build, batch * d, n_steps, quick=quick, devices=devices)


SUITE_CASES = (
    case(1024, 2, (64, 64, 64), quick=True),
    case(1, 2, (64, 64, 64)),
    case(1024, 64, (128, 128)),
    case(1024, 2, (20,)),
    case(4096, 2, (64, 64, 64), devices=("cuda",)),
    case(4096, 2, (128, 128, 128), devices=("cuda",)),
    # A CPU computes them in float32.
    case(4096, 2, (64, 64, 64), devices=("cuda",), bfloat16=True),
    case(4096, 2, (128, 128, 128), devices=("cuda",), bfloat16=True),
    case(4096, 2, (128, 128, 128, 128), devices=("cuda",), bfloat16=True),
)


def test_mlp(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
