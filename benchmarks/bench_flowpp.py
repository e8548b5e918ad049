"""Flow++ by part: log_prob, sampling and a training step, with our ops and with plain PyTorch.

    pytest benchmarks/bench_flowpp.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'flowpp/*'

Same model, same inputs, same masks of dropout. "reference" replaces the mixture coupling by
``coopflow_ext.reference``, its inverse by the published batch-wide bisection, and the operators
of the networks by those of ``plain.py``; in "reference, compiled" torch.compile makes the
mixture's forward, and the evaluations inside the bisection. On CUDA the whole is waited for, and
the parts are the host's share.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import plain
import torch
from bench_mixture_logistic import FORWARD, INVERSE, compiled_forward, compiled_inverse
from harness import NOT_COMPILED, OURS, Case, Contest, counted_flops, run_pytest
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
    "paper": {"image_shape": (3, 32, 32)},
}
COMPILED = "reference, compiled"
MIXTURE = (FORWARD, INVERSE)
NETWORKS = ("attention", "concat_elu", "gate_add_norm", "weight_norm")


def variants(with_compile: bool) -> dict[str, dict[str, Any]]:
    """What stands for the flow's ops, by contestant."""
    networks = {name: getattr(plain, name) for name in NETWORKS}
    mixture = {
        FORWARD: reference.mixture_logistic_coupling,
        INVERSE: plain.mixture_logistic_coupling_inverse,
    }
    found: dict[str, dict[str, Any]] = {
        OURS: {name: getattr(ops, name) for name in MIXTURE},
        "reference": {**networks, **mixture},
    }
    if with_compile:
        compiled = {FORWARD: compiled_forward(None), INVERSE: compiled_inverse(None)}
        found[COMPILED] = {**networks, **compiled}
    return found


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
def instrumented(variant: dict[str, Any], totals: Totals) -> Iterator[None]:
    """The variant's ops in place, with the time spent in the mixture's and in the conditioners
    added up."""
    in_place = {n: _timed(op, totals, "mixture op") if n in MIXTURE else op
                for n, op in variant.items()}  # fmt: skip
    conditioner = flows.FlowPPConditioner
    forward = conditioner.forward

    def timed_forward(self: Any, x: Tensor, context: flows.Context) -> Tensor:
        return _timed(forward, totals, "conditioners")(self, x, context)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(ops, **in_place))
        stack.enter_context(mock.patch.object(conditioner, "forward", timed_forward))
        yield


def sample(flow: flows.Flow, x: Tensor) -> list[Tensor]:
    return [flow.sample(len(x), Key(1))]


def train_step(flow: flows.Flow, x: Tensor, totals: Totals | None = None) -> None:
    flow.zero_grad(set_to_none=True)
    loss = -flow.log_prob(x, key=Key(2)).mean()
    begin = time.perf_counter()
    loss.backward()
    if totals is not None:
        totals["backward"] += time.perf_counter() - begin


def gradients(flow: flows.Flow, x: Tensor) -> list[Tensor]:
    """Of a training step."""
    train_step(flow, x)
    return [p.grad for p in flow.parameters() if p.grad is not None]


def measure(task: str, variant: dict[str, Any], flow: flows.Flow, x: Tensor) -> Totals:
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


def check_equal(variants: dict[str, dict[str, Any]], flow: flows.Flow, x: Tensor) -> None:
    """Every variant computes the same before anything is timed.

    Samples are compared by their quantiles of error: where a CDF is flat, bisection does not
    determine x in float32, and where it is next to 1 not that of F alone, the published one, which
    later layers stretch. Ours have the samples of a bisection in both tails, of the reference.
    """
    results = {}
    exact = {**variants["reference"], INVERSE: reference.mixture_logistic_coupling_inverse}
    with instrumented(exact, defaultdict(float)):
        expected = sample(flow, x)[0]
    for name, variant in variants.items():
        with instrumented(variant, defaultdict(float)):
            with torch.no_grad():
                log_prob = flow.log_prob(x, key=Key(2))
            results[name] = (sample(flow, x)[0], log_prob, gradients(flow, x))
    ours, our_log_prob, our_grads = results.pop(OURS)
    quantiles = {"the reference's bisection": (expected, 0.99)}
    quantiles |= {name: (theirs, 0.9) for name, (theirs, *_) in results.items()}
    for name, (theirs, quantile) in quantiles.items():
        error = (ours - theirs).abs().flatten().quantile(quantile).item()
        assert error < 1e-2, f"{name}: samples differ by {error:.2g}"
    for name, (_, log_prob, grads) in results.items():
        torch.testing.assert_close(our_log_prob, log_prob, rtol=1e-4, atol=1e-2)
        for a, b in zip(our_grads, grads, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-2, atol=1e-3 * (1 + b.abs().max().item()),
                msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip


def case(task: str, size: str, batch: int, *, quick: bool = False, **kw: Any) -> Case:
    """A task as a case of the suite, by part."""
    shape = SIZES[size]["image_shape"]

    def build(device: torch.device, with_compile: bool) -> Contest:
        torch.manual_seed(0)
        # Without their clamp of the CDF the published bisection ends where float32 has no CDF left.
        flow = flows.flowpp(**SIZES[size], legacy_cdf_clamp=True).to(device)
        flow.cuda_graph = False  # a graph of one contestant would be replayed for all of them
        x = torch.rand(batch, *shape, device=device) * 2 - 1
        flow.initialize(x, key=Key(0))
        ways = variants(with_compile)
        runs = {name: partial(measure, task, ops_of, flow, x) for name, ops_of in ways.items()}
        return Contest(
            runs,
            partial(check_equal, ways, flow, x),
            missing={} if with_compile else {COMPILED: NOT_COMPILED},
            flops=counted_flops(runs[OURS]),
            by_part=True,
        )

    return Case(f"flowpp/{task}/{size}/{batch}", build, batch * math.prod(shape), quick=quick, **kw)


TASKS = ("log_prob", "sampling", "training step")
SUITE_CASES = (
    *(case(task, "digits", 64) for task in TASKS),
    *(case(task, "paper", 28, devices=("cuda",)) for task in TASKS),
)


def test_flowpp(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
