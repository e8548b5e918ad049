"""The mixture-of-logistics coupling beside plain PyTorch: the published formulas and bisection.

    pytest benchmarks/bench_mixture_logistic.py [--device cuda] [-k inverse]
    python benchmarks/bench_mixture_logistic.py [--elements 14] [--json FILE] [--compile]

Under pytest each case is timed by pytest-benchmark after its result was checked. As a program it
times ours and the others in turns within one process and prints ratios, which is what means
something on a shared machine; ``--compile`` adds torch.compile of the plain formulas. Memory of a
forward and backward pass is the CUDA allocator's peak beyond the arguments; on the CPU, where torch
counts no allocations, the bytes that autograd keeps between the passes, beyond arguments and
results.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, Contest, run_pytest
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext import reference

Op = Callable[..., tuple[Tensor, Tensor]]
FORWARD, INVERSE = "mixture_logistic_coupling", "mixture_logistic_coupling_inverse"


def inputs(elements: int, components: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of chains of 1,024 elements, with parameters as a trained flow has them."""
    g = torch.Generator().manual_seed(0)
    shape = (max(1, elements // 1024), min(elements, 1024))

    def normal(rows: int) -> Tensor:
        return torch.randn((shape[0], rows, shape[1]), generator=g)

    parts = (normal(1).tanh(), normal(1), normal(components), 2 * normal(components))
    params = torch.cat((*parts, normal(components) - 1.5), dim=1)
    return torch.randn(shape, generator=g).to(device), params.to(device)


def check(name: str, x: Tensor, params: Tensor) -> None:
    """Before anything is timed: the inverse solves, the forward equals the reference in float64."""
    y, ladj = cf.ops.mixture_logistic_coupling(x, params)
    expected, expected_ladj = reference.mixture_logistic_coupling(x.double(), params.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ladj.double(), expected_ladj, rtol=2e-6, atol=1e-3)
    if name == INVERSE:
        back, _ = cf.ops.mixture_logistic_coupling_inverse(y, params)
        again, _ = reference.mixture_logistic_coupling(back.double(), params.double())
        torch.testing.assert_close(again, y.double(), rtol=1e-4, atol=1e-4)


def pass_of(op: Op, x: Tensor, params: Tensor, backward: bool) -> Callable[[], Any]:
    if not backward:

        def run() -> Any:
            with torch.no_grad():
                return op(x, params)

        return run
    x, params = x.clone().requires_grad_(), params.clone().requires_grad_()

    def run_both() -> Any:
        out, ladj = op(x, params)
        return torch.autograd.grad(out.sum() + ladj.sum(), (x, params))

    return run_both


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- pytest-benchmark -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["ours", "reference"])
@pytest.mark.parametrize("what", ["forward", "forward+backward", "inverse"])
@pytest.mark.parametrize("components", [8, 32])
def test_mixture_logistic_coupling(
    benchmark: Any, what: str, components: int, source: str, device: torch.device
) -> None:
    name = INVERSE if what == "inverse" else FORWARD
    x, params = inputs(2**20 if device.type == "cuda" else 2**12, components, device)
    check(name, x, params)
    op = getattr(cf.ops if source == "ours" else reference, name)
    run = pass_of(op, x, params, what == "forward+backward")

    def timed() -> None:
        run()
        synchronize(device)

    benchmark.group = f"{what}, K={components}, {x.numel()} elements"
    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)


# --- cases of the suite ---------------------------------------------------------------------------


@functools.cache
def compiled(name: str) -> Op:
    return torch.compile(getattr(reference, name), dynamic=False)


def harness_case(
    what: str, elements: int, components: int, *, quick: bool = False, **kw: Any
) -> Case:
    """Ours, the published formulas or bisection, and the compiled formulas."""
    name, both = (INVERSE if what == "inverse" else FORWARD), what == "forward+backward"

    def build(device: torch.device, with_compile: bool) -> Contest:
        x, params = inputs(elements, components, device)
        argument = cf.ops.mixture_logistic_coupling(x, params)[0] if what == "inverse" else x
        sources: dict[str, Op] = {"ours": getattr(cf.ops, name)}
        sources["bisection" if what == "inverse" else "eager"] = getattr(reference, name)
        missing = {}
        if what == "inverse":
            missing["torch.compile"] = "the bisection reads the host at each iteration"
        elif with_compile:
            sources["torch.compile"] = compiled(name)
        else:
            missing["torch.compile"] = "compilation was left out of this run"

        def check_all() -> None:
            check(name, x, params)
            expected, expected_ladj = reference.mixture_logistic_coupling(
                x.double(), params.double()
            )
            for source, op in sources.items():
                if source in ("ours", "bisection"):
                    continue
                y, ladj = op(x, params)
                torch.testing.assert_close(
                    y.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda m, s=source: f"{s}: {m}"
                )
                torch.testing.assert_close(ladj.double(), expected_ladj, rtol=1e-5, atol=1e-2)
            if what == "inverse":
                back, _ = getattr(reference, name)(argument, params)
                error = (back - x).abs().flatten().quantile(0.99).item()
                assert error < 1e-2, f"bisection: {error}"

        item = 4 * (3 + 3 * components + 1) * x.numel()  # x, a, b, the components; y
        return Contest(
            {n: pass_of(op, argument, params, both) for n, op in sources.items()},
            check_all,
            {} if both else {"ours": item},
            missing,
        )

    return Case(
        f"mixture_logistic/{what}/K{components}/{elements}", build, elements, quick=quick, **kw
    )


SUITE_CASES = (
    harness_case("forward", 2**14, 32),
    harness_case("inverse", 2**14, 32, quick=True),
    harness_case("forward+backward", 2**14, 32, quick=True),
    harness_case("forward", 2**20, 32, devices=("cuda",)),
    harness_case("inverse", 2**20, 32, devices=("cuda",)),
    harness_case("forward+backward", 2**20, 32, devices=("cuda",)),
    harness_case("inverse", 28 * 1024, 32, devices=("cuda",)),
)


@pytest.mark.parametrize("case", SUITE_CASES, ids=lambda c: c.name)
def test_suite_case(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)


# --- ratios in one process ------------------------------------------------------------------------


def interleaved(runs: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> Any:
    """Median, 20th and 80th percentile of each in milliseconds, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    quantiles = {n: statistics.quantiles(t, n=10, method="inclusive") for n, t in times.items()}
    return {n: {"p20": q[1], "median": q[4], "p80": q[7]} for n, q in quantiles.items()}


def kept_bytes(op: Op, x: Tensor, params: Tensor) -> int:
    """Bytes that autograd keeps between the passes, arguments and results apart."""
    x, params = x.clone().requires_grad_(), params.clone().requires_grad_()
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out, ladj = op(x, params)
    for t in (x, params, out, ladj):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--elements", type=int, default=14, help="log2 of their number")
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    x, params = inputs(2**args.elements, args.components, device)
    y, _ = cf.ops.mixture_logistic_coupling(x, params)
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "build": json.loads(torch.ops.coopflow.build_info()),
        "elements": x.numel(),
        "components": args.components,
    }
    print(json.dumps(report))
    for what in ("forward", "forward+backward", "inverse"):
        name = INVERSE if what == "inverse" else FORWARD
        check(name, x, params)
        both = what == "forward+backward"
        argument = y if what == "inverse" else x
        sources: dict[str, Op] = {
            "ours": getattr(cf.ops, name),
            "reference": getattr(reference, name),
        }
        if args.compile and what != "inverse":  # the bisection reads the host at each iteration
            sources["reference, compiled"] = torch.compile(getattr(reference, name))
        runs = {n: pass_of(op, argument, params, both) for n, op in sources.items()}
        times = interleaved(runs, device, args.rounds)
        report[what] = {"milliseconds": times}
        ours = times["ours"]["median"]
        for n, t in times.items():
            print(
                f"{what:18s} {n:20s} {t['median']:10.3f} ms ({t['p20']:.3f} - {t['p80']:.3f})"
                f"  x{t['median'] / ours:.1f}"
            )
        if both:
            if device.type == "cuda":
                memory = {n: peak_bytes(run, device) for n, run in runs.items()}
            else:
                memory = {n: kept_bytes(op, x, params) for n, op in sources.items()}
            report[what]["bytes"] = memory
            kind = "peak" if device.type == "cuda" else "kept for backward"
            print(f"{what:18s} bytes {kind}: {memory}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
