"""Flow++ on the CPU, by part: sampling and a training step, with our ops and with plain PyTorch.

    python benchmarks/bench_flowpp.py [--size digits|patches|paper] [--batch N] [--repeats N]
                                      [--json FILE]

Same model, same inputs, in turns within one process. "reference" replaces the mixture coupling by
``coopflow_ext.reference``, whose inverse is the published batch-wide bisection. Times are medians
in milliseconds. On a shared machine only ratios mean something.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import Case, Contest, run_pytest
from torch import Tensor

from coopflow_ext import Key, flows, ops, reference

SIZES: dict[str, dict[str, Any]] = {
    "digits": {
        "image_shape": (1, 8, 8),
        "channels": 32,
        "blocks": 1,
        "components": 8,
        "dequant_blocks": 1,
        "dequant_components": 4,
    },
    "patches": {
        "image_shape": (3, 32, 32),
        "channels": 32,
        "blocks": 1,
        "components": 8,
        "dequant_blocks": 1,
        "dequant_components": 4,
    },
    "paper": {"image_shape": (3, 32, 32)},
}
FORWARD, INVERSE = "mixture_logistic_coupling", "mixture_logistic_coupling_inverse"
VARIANTS = {
    "ours": {name: getattr(ops, name) for name in (FORWARD, INVERSE)},
    "reference": {name: getattr(reference, name) for name in (FORWARD, INVERSE)},
}
Totals = dict[str, float]


def _timed(function: Callable[..., Any], totals: Totals, part: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            totals[part] += time.perf_counter() - begin

    return call


@contextmanager
def instrumented(variant: str, totals: Totals) -> Iterator[None]:
    """The variant's ops in place, with the time spent in them and in the conditioners added up."""
    timed_ops = {name: _timed(op, totals, "mixture op") for name, op in VARIANTS[variant].items()}
    conditioner = flows.FlowPPConditioner
    forward = conditioner.forward

    def timed_forward(self: Any, x: Tensor, context: flows.Context) -> Tensor:
        return _timed(forward, totals, "conditioners")(self, x, context)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(ops, **timed_ops))
        stack.enter_context(mock.patch.object(conditioner, "forward", timed_forward))
        yield


def sample(flow: flows.Flow, x: Tensor) -> list[Tensor]:
    return [flow.sample(len(x), Key(1))]


def train_step(flow: flows.Flow, x: Tensor, totals: Totals | None = None) -> list[Tensor]:
    flow.zero_grad(set_to_none=True)
    loss = -flow.log_prob(x, key=Key(2)).mean()
    begin = time.perf_counter()
    loss.backward()
    if totals is not None:
        totals["backward"] += time.perf_counter() - begin
    return [p.grad for p in flow.parameters() if p.grad is not None]


def measure(task: str, variant: str, flow: flows.Flow, x: Tensor) -> Totals:
    """Seconds of each part of one run of the task."""
    totals: Totals = defaultdict(float)
    with instrumented(variant, totals):
        begin = time.perf_counter()
        if task == "sampling":
            sample(flow, x)
        elif task == "log_prob":
            with torch.no_grad():
                flow.log_prob(x, key=Key(2))
        else:
            train_step(flow, x, totals)
        if x.is_cuda:  # parts are then the host's share; only the whole is device time
            torch.cuda.synchronize()
        whole = time.perf_counter() - begin
    totals["other layers"] = whole - sum(totals.values())
    totals["whole"] = whole
    return dict(totals)


def check_equal(flow: flows.Flow, x: Tensor) -> None:
    """Both variants compute the same before anything is timed.

    Samples are compared by their quantiles of error: where a CDF is flat, the published bisection
    does not determine x in float32.
    """
    results = {}
    for variant in VARIANTS:
        with instrumented(variant, defaultdict(float)):
            results[variant] = (sample(flow, x)[0], train_step(flow, x))
    (ours, our_grads), (theirs, their_grads) = results.values()
    error = (ours - theirs).abs().flatten()
    assert error.quantile(0.99).item() < 1e-2, error.quantile(0.99)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * (1 + b.abs().max().item()))


def harness_case(task: str, size: str, batch: int, *, quick: bool = False) -> Case:
    """A task as a case of the suite, by part."""
    shape = SIZES[size]["image_shape"]

    def build(device: torch.device, with_compile: bool) -> Contest:
        flow = flows.flowpp(**SIZES[size]).to(device)
        x = torch.rand(batch, *shape, device=device) * 2 - 1
        flow.initialize(x, key=Key(0))
        runs = {name: partial(measure, task, name, flow, x) for name in VARIANTS}
        return Contest(runs, partial(check_equal, flow, x), by_part=True)

    return Case(f"flowpp/{task}/{size}/{batch}", build, batch * math.prod(shape), quick=quick)


SUITE_CASES = (
    harness_case("log_prob", "digits", 64),
    harness_case("sampling", "digits", 64),
    harness_case("training step", "digits", 64),
)


@pytest.mark.parametrize("case", SUITE_CASES, ids=lambda c: c.name)
def test_flowpp(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)


def report(medians: dict[str, dict[str, Totals]]) -> None:
    for task, variants in medians.items():
        print(f"\n{task:<16}{'ours':>14}{'reference':>14}{'ratio':>8}")
        for part, seconds in variants["ours"].items():
            theirs = variants["reference"][part]
            print(
                f"{part:<16}{seconds * 1e3:>11.2f} ms{theirs * 1e3:>11.2f} ms"
                f"{theirs / seconds:>8.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    flow = flows.flowpp(**SIZES[args.size])
    x = torch.rand(args.batch, *flow.event_shape) * 2 - 1
    flow.initialize(x, key=Key(0))
    print(
        f"Flow++ {args.size}, batch {args.batch}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.processor()}"
    )
    check_equal(flow, x)
    medians: dict[str, dict[str, Totals]] = {}
    for task in ("sampling", "training step"):
        runs: dict[str, list[Totals]] = {name: [] for name in VARIANTS}
        for _ in range(args.repeats):
            for name in VARIANTS:
                runs[name].append(measure(task, name, flow, x))
        medians[task] = {
            name: {part: statistics.median(r[part] for r in rows) for part in rows[0]}
            for name, rows in runs.items()
        }
    report(medians)
    if args.json:
        args.json.write_text(json.dumps(medians, indent=2) + "\n")


if __name__ == "__main__":
    main()
