"""LayerNorm of a gated residual sum beside eager and compiled PyTorch.

    pytest benchmarks/bench_gate_add_norm.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'gate_add_norm/*'

"eager" is GLU, a sum and LayerNorm. Bytes per element of x of size s: ours and the compiled step
read x and the gates and write the result, 4s; backward they read these and a gradient and write
those of x and of the gates, 7s; what eager moves is counted operator by operator
(`harness.counted_bytes`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain
import torch
from harness import (
    NOT_COMPILED,
    OURS,
    Case,
    Contest,
    counted_bytes,
    dtype_name,
    pass_of,
    run_pytest,
)
from torch import Tensor

from coopflow_ext import ops, reference

EAGER, COMPILED = "eager", "torch.compile"
FUSED_BYTES = {False: 4, True: 11}
ARITHMETIC = "arithmetic: the gates' exponentials and sums over short rows"
HOST = "the host's part of autograd"
Op = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def inputs(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, gates, weight and bias; the parameters are in float32."""
    g = torch.Generator().manual_seed(0)
    *rows, channels = shape
    x, gates = (torch.randn(*rows, n, generator=g) for n in (channels, 2 * channels))
    parameters = (torch.randn(channels, generator=g).to(device) for _ in range(2))
    return (x.to(device, dtype), gates.to(device, dtype), *parameters)


def in_half(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Torch's LayerNorm on a GPU takes parameters of the activations' type only."""
    return plain.gate_add_norm(x, gates, weight.to(x.dtype), bias.to(x.dtype))


def check(sources: dict[str, Op], given: tuple[Tensor, ...], backward: bool) -> None:
    """Results and gradients of every source against the reference in float64."""

    def results(op: Op, *dtypes: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(d).requires_grad_() for t, d in zip(given, dtypes, strict=True)]
        y = op(*leaves)
        grad_y = torch.arange(y.numel(), device=y.device).sin().view(y.shape).to(y)
        found = [y, *torch.autograd.grad(y, leaves, grad_y)] if backward else [y]
        return [t.detach().double() for t in found]

    expected = results(reference.gate_add_norm, *[torch.float64] * 4)
    bound = 8 * torch.finfo(given[0].dtype).eps
    # Of the parameters' gradients each term is about 1, and torch adds them up one by one.
    rows = given[0][..., 0].numel()
    scales = [max(1.0, t.abs().max().item()) for t in expected[:3]] + [rows, rows]
    for source, op in sources.items():
        found = results(op, *(t.dtype for t in given))
        for i, (got, wanted) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(
                got, wanted, rtol=0, atol=bound * scales[i],
                msg=lambda text, s=source, i=i: f"{s}, result {i}: {text}",
            )  # fmt: skip


def case(what: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **kw: Any) -> Case:
    """Rows of channels, as the flows have them."""
    both = what == "forward+backward"

    def build(device: torch.device, with_compile: bool) -> Contest:
        given = inputs(shape, device, dtype)
        sources: dict[str, Op] = {OURS: ops.gate_add_norm, EAGER: in_half}
        missing = {}
        if with_compile:
            sources[COMPILED] = torch.compile(in_half, dynamic=False)
        else:
            missing[COMPILED] = NOT_COMPILED
        runs = {name: pass_of(op, given, both) for name, op in sources.items()}
        fused = FUSED_BYTES[both] * given[0].nbytes
        on_cuda = {OURS: HOST} if both else {}
        return Contest(
            runs,
            lambda: check(sources, given, both),
            {n: counted_bytes(run) if n == EAGER else fused for n, run in runs.items()},
            dict.fromkeys(runs, ARITHMETIC) if device.type == "cpu" else on_cuda,
            missing,
        )

    title = f"gate_add_norm/{what}/{dtype_name(dtype)}/{'x'.join(map(str, shape))}"
    return Case(title, build, torch.Size(shape).numel(), **kw)


# Of the presets' flow digits-flowpp, and of the paper's networks on CIFAR-10.
SUITE_CASES = (
    case("forward", (64, 32, 32), quick=True),
    case("forward+backward", (64, 32, 32), quick=True),
    case("forward+backward", (4, 512, 96), devices=("cpu",)),
    case("forward", (28, 512, 96), devices=("cuda",)),
    case("forward+backward", (28, 512, 96), devices=("cuda",)),
    case("forward+backward", (28, 512, 96), torch.bfloat16, devices=("cuda",)),
)


def test_gate_add_norm(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
