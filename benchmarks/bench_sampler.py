"""LangevinSampler against a well-written plain loop and torchebm's sampler, same score.

    pytest benchmarks/bench_sampler.py --benchmark-group-by=param:case
    python benchmarks/bench_sampler.py [--repeats 15] [--device cpu|cuda]

The program runs the contestants in turns within one process and prints medians of the ratio of
times, with their 20th and 80th percentile, and the sampler's overhead: its time per step beyond
the score's own. On a shared machine only ratios mean something. Every contestant is checked
before it is timed: the plain loop and ours take the same supplied normals to the same state.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import jax_chain
import pytest
import torch
from torch import Tensor

from coopflow_ext import Key, LangevinSampler
from coopflow_ext.energies import GaussianMixtureEnergy, MLPEnergy, ResEnergy

STEP_SIZE = 0.05
KEY = Key(0)
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """An energy, or a score in closed form, and where its chains start."""

    function: Callable[[Tensor], Tensor]
    x0: Tensor
    n_steps: int
    is_score: bool = False

    def options(self) -> dict[str, Any]:
        name = "score" if self.is_score else "energy"
        return {name: self.function, "n_steps": self.n_steps, "step_size": STEP_SIZE}

    def score(self, x: Tensor) -> Tensor:
        if self.is_score:
            return self.function(x)
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(self.function(leaf).sum(), leaf)
        return grad.neg_()


def _mixture(device: str) -> GaussianMixtureEnergy:
    angle = torch.arange(8) * (math.pi / 4)
    means = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixtureEnergy(means, 0.3).to(device)


def make_case(name: str, device: str = "cpu") -> Case:
    torch.manual_seed(0)
    points = torch.randn(1024, 2, device=device)
    if name == "mixture, autograd":
        return Case(_mixture(device), points, 50)
    if name == "mixture, closed form":
        return Case(_mixture(device).score, points, 50, is_score=True)
    if name == "MLP":
        return Case(MLPEnergy(2).to(device).requires_grad_(False), points, 50)
    energy = ResEnergy(width=16, image_size=32).to(device).requires_grad_(False)
    return Case(energy, torch.rand(8, 3, 32, 32, device=device) * 2 - 1, 4)


CASES = ("mixture, autograd", "mixture, closed form", "MLP", "ResEnergy")


def plain_loop(
    case: Case, xi: Tensor | None = None, score: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """In place, noise into one buffer, no check of anything."""
    score = score or case.score
    x, noise = case.x0.clone(), torch.empty_like(case.x0)
    for k in range(case.n_steps):
        x.add_(score(x), alpha=STEP_SIZE**2 / 2)
        x.add_(noise.normal_() if xi is None else xi[k], alpha=STEP_SIZE)
    return x


def contestants(case: Case) -> dict[str, Run]:
    """What is timed, each checked against the plain loop."""
    sampler = LangevinSampler(**case.options())
    xi = torch.randn(case.n_steps, *case.x0.shape, device=case.x0.device)
    torch.testing.assert_close(
        sampler(case.x0, xi=xi).x, plain_loop(case, xi), rtol=1e-4, atol=1e-4
    )
    runs: dict[str, Run] = {
        "plain loop": lambda: plain_loop(case),
        "ours": lambda: sampler(case.x0, key=KEY).x,
    }
    if (theirs := _torchebm(case)) is not None:
        runs["torchebm"] = theirs
    if (theirs := _jax(case, xi)) is not None:
        runs["JAX scan"] = theirs
    return runs


def compiled_score(case: Case) -> Callable[[Tensor], Tensor]:
    """The score as one compiled function of x."""
    gradient = torch.compile(torch.func.grad(lambda x: case.function(x).sum()), dynamic=False)
    return lambda x: gradient(x).neg()


def harness_case(name: str, elements: int, steps: int, *, quick: bool = False) -> harness.Case:
    """A chain as a case of the suite; all contestants run the same number of steps."""

    def build(device: torch.device, with_compile: bool) -> harness.Contest:
        case = make_case(name, device.type)
        runs = contestants(case)
        runs = {"ours": runs.pop("ours"), **runs}
        missing = {} if "torchebm" in runs else {"torchebm": "not installed"}
        if "JAX scan" not in runs:
            missing["JAX scan"] = jax_chain.why_not(device) or jax_chain.NOT_WRITTEN
        if not case.is_score and with_compile:
            score = compiled_score(case)
            runs["compiled gradient"] = lambda: plain_loop(case, score=score)
        elif not case.is_score:
            missing["compiled gradient"] = "compilation was left out of this run"
        if device.type == "cuda":
            runs["CUDA graph of plain loop"] = harness.cuda_graph(lambda: plain_loop(case))

        def check() -> None:  # contestants() has checked the rest
            if "compiled gradient" in runs:
                torch.testing.assert_close(
                    score(case.x0), case.score(case.x0), rtol=1e-4, atol=1e-4
                )

        return harness.Contest(runs, check, missing=missing)

    return harness.Case(f"chain/{name}", build, elements, steps, quick=quick)


def _torchebm(case: Case) -> Run | None:
    """torchebm's sampler with the same energy or score; None where it is not installed."""
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics
    except ImportError:
        return None

    class Model(BaseModel):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return case.function(x)

    class ScoreModel(Model):
        def gradient(self, x: Tensor) -> Tensor:
            return -case.function(x)

    device = case.x0.device
    model = (ScoreModel if case.is_score else Model)(device=device)
    eta = STEP_SIZE**2 / 2
    sampler = LangevinDynamics(model, step_size=eta, noise_scale=1.0, device=device)
    quiet = LangevinDynamics(model, step_size=eta, noise_scale=1e-20, device=device)
    zeros = torch.zeros(case.n_steps, *case.x0.shape, device=device)
    torch.testing.assert_close(
        quiet.sample(case.x0.clone(), n_steps=case.n_steps), plain_loop(case, zeros),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    return lambda: sampler.sample(case.x0.clone(), n_steps=case.n_steps)


def _jax(case: Case, xi: Tensor) -> Run | None:
    """A jitted scan; None without JAX for the device, or without the energy in JAX."""
    if jax_chain.why_not(case.x0.device):
        return None
    made = jax_chain.make_chain(case.function, case.x0, case.n_steps, STEP_SIZE)
    if made is None:
        return None
    run, supplied = made
    torch.testing.assert_close(supplied(xi), plain_loop(case, xi), rtol=1e-4, atol=1e-4)
    return run


SUITE_CASES = (
    harness_case("mixture, autograd", 2048, 50),
    harness_case("mixture, closed form", 2048, 50),
    harness_case("MLP", 2048, 50, quick=True),
    harness_case("ResEnergy", 8 * 3072, 4),
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("contestant", ["plain loop", "ours", "torchebm"])
def test_chain(benchmark: Any, case: str, contestant: str, device: torch.device) -> None:
    runs = contestants(make_case(case, device.type))
    if contestant not in runs:
        pytest.skip(f"{contestant} is not installed")

    def run() -> None:
        runs[contestant]()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=7, warmup_rounds=2)


def seconds(run: Run, device: str) -> float:
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def ratios(runs: dict[str, Run], name: str, repeats: int, device: str) -> str:
    """Time of ``name`` by ours, in turns: median (20th to 80th percentile)."""
    values = sorted(
        seconds(runs[name], device) / seconds(runs["ours"], device) for _ in range(repeats)
    )
    low, high = values[repeats // 5], values[-1 - repeats // 5]
    return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"


def overhead(repeats: int, device: str) -> float:
    """Microseconds per step of the default sampler beyond a cheap score, one chain."""
    x0, n_steps = torch.zeros(1, 2, device=device), 400
    sampler = LangevinSampler(score=torch.neg, n_steps=n_steps, step_size=STEP_SIZE)

    def bare() -> None:
        for _ in range(n_steps):
            torch.neg(x0)

    differences = [
        seconds(lambda: sampler(x0, key=KEY), device) - seconds(bare, device)
        for _ in range(repeats)
    ]
    return 1e6 * statistics.median(differences) / n_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    print(f"{'case':<24}{'plain loop / ours':<26}torchebm / ours")
    for name in CASES:
        runs = contestants(make_case(name, args.device))
        cells = [
            ratios(runs, other, args.repeats, args.device) if other in runs else "not installed"
            for other in ("plain loop", "torchebm")
        ]
        print(f"{name:<24}{cells[0]:<26}{cells[1]}", flush=True)
    both = {
        "autograd": contestants(make_case("mixture, autograd", args.device))["plain loop"],
        "ours": contestants(make_case("mixture, closed form", args.device))["ours"],
    }
    print(
        "plain loop with autograd / ours with the mixture's closed form: "
        f"{ratios(both, 'autograd', args.repeats, args.device)}"
    )
    print(f"overhead: {overhead(args.repeats, args.device):.1f} µs per step beyond the score")


if __name__ == "__main__":
    main()
