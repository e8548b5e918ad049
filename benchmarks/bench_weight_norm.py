"""Weight norm of all layers of a flow beside a call of torch's operator for each layer.

    pytest benchmarks/bench_weight_norm.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'weight_norm/*'

Bytes per element of size s: either reads v and writes w, 2s; backward it reads v and the gradient
of w and writes that of v, 3s. Gains are a number a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import plain
import torch
from bench_flowpp import SIZES
from harness import OURS, Case, Contest, run_pytest
from torch import Tensor

from coopflow_ext import flows, ops, reference
from coopflow_ext.flows.weight_norm import WeightNormed

BY_LAYER = "a call a layer"
CALLS = "calls: most layers are small"
Tensors = Sequence[Tensor]
Op = Callable[[Tensors, Tensors], Tensors]


@functools.cache
def shapes_of(size: str) -> tuple[torch.Size, ...]:
    """Of the directions of a flow's layers."""
    with torch.device("meta"):
        flow = flows.flowpp(**SIZES[size])
    found = [m for m in flow.modules() if isinstance(m, WeightNormed)]
    return tuple(m.parametrizations["weight"].original1.shape for m in found)


def layers(size: str, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    g, shapes = torch.Generator().manual_seed(0), shapes_of(size)
    directions = [torch.randn(shape, generator=g).to(device) for shape in shapes]
    gains = [torch.rand((s[0], *[1] * (len(s) - 1)), generator=g).to(device) for s in shapes]
    return directions, gains


def pass_of(op: Op, directions: Tensors, gains: Tensors, backward: bool) -> Callable[[], Any]:
    if not backward:

        def run() -> Any:
            with torch.no_grad():
                return op(directions, gains)

        return run
    vs, gs = ([t.clone().requires_grad_() for t in given] for given in (directions, gains))
    grads = [torch.randn_like(v) for v in directions]

    def run_both() -> Any:
        return torch.autograd.grad(op(vs, gs), [*vs, *gs], grads)

    return run_both


def check(sources: dict[str, Op], directions: Tensors, gains: Tensors) -> None:
    """Weights and gradients of every source against the reference in float64."""

    def results(op: Op, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (*directions, *gains)]
        count = len(directions)
        weights = op(leaves[:count], leaves[count:])
        grads = torch.autograd.grad(sum(w.sin().sum() for w in weights), leaves)
        return [t.detach().double() for t in (*weights, *grads)]

    expected = results(reference.weight_norm, torch.float64)
    for source, op in sources.items():
        for i, (got, wanted) in enumerate(zip(results(op, torch.float32), expected, strict=True)):
            torch.testing.assert_close(
                got, wanted, rtol=0, atol=2e-5 * max(1.0, wanted.abs().max().item()),
                msg=lambda text, s=source, i=i: f"{s}, result {i}: {text}",
            )  # fmt: skip


def case(what: str, size: str, **kw: Any) -> Case:
    backward = what == "forward+backward"
    elements = sum(shape.numel() for shape in shapes_of(size))

    def build(device: torch.device, with_compile: bool) -> Contest:
        directions, gains = layers(size, device)
        sources: dict[str, Op] = {OURS: ops.weight_norm, BY_LAYER: plain.weight_norm}
        runs = {name: pass_of(op, directions, gains, backward) for name, op in sources.items()}
        return Contest(
            runs,
            lambda: check(sources, directions, gains),
            dict.fromkeys(runs, (5 if backward else 2) * 4 * elements),
            dict.fromkeys(runs, CALLS),
        )

    return Case(f"weight_norm/{what}/fp32/{size}", build, elements, **kw)


SUITE_CASES = (
    case("forward", "digits", quick=True),
    case("forward+backward", "digits", quick=True),
    case("forward", "paper"),
    case("forward+backward", "paper"),
)


def test_weight_norm(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
