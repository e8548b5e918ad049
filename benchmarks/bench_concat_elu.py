"""Concat-ELU with dropout of channels by key beside eager and compiled PyTorch.

    pytest benchmarks/bench_concat_elu.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'concat_elu/*'

"eager" is what the flows did before there was an op: negation, concatenation, ELU in place, and
with dropout the mask by `ops.uniform` and a product. Bytes per element of x of size s: ours and the
compiled step read x and write the result, 3s; backward they read the result and its gradient and
write a gradient, 5s; what eager moves is counted operator by operator (`harness.counted_bytes`).
"""

from __future__ import annotations

import functools
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

from coopflow_ext import Key, ops, reference

P = 0.2
EAGER, COMPILED = "eager", "torch.compile"
FUSED_BYTES = {False: 3, True: 8}
ARITHMETIC = "arithmetic: the exponential and the mask"
HOST = "the host's part of autograd"
Op = Callable[[Tensor], Tensor]


def check(sources: dict[str, Op], x: Tensor, rng: Tensor | None, backward: bool) -> None:
    """Results and gradients of every source against the reference in float64."""

    def results(op: Op, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.detach().to(dtype).requires_grad_(backward)
        y = op(leaf)
        found = [y, *torch.autograd.grad(y.sin().sum(), leaf)] if backward else [y]
        return [t.detach().double() for t in found]

    expected = results(lambda x: reference.concat_elu(x, rng, P), torch.float64)
    bound = 8 * torch.finfo(x.dtype).eps
    for source, op in sources.items():
        for i, (got, wanted) in enumerate(zip(results(op, x.dtype), expected, strict=True)):
            torch.testing.assert_close(
                got, wanted, rtol=bound, atol=bound,
                msg=lambda text, s=source, i=i: f"{s}, result {i}: {text}",
            )  # fmt: skip


def case(
    what: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    dropout: bool = True,
    **kw: Any,
) -> Case:
    """Images in channels_last, as the flows have them."""
    both = what == "forward+backward"

    def build(device: torch.device, with_compile: bool) -> Contest:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x = x.to(device, dtype, memory_format=torch.channels_last)
        rng = Key(0).tensor(device) if dropout else None
        eager = functools.partial(plain.concat_elu, rng=rng, p=P)
        sources: dict[str, Op] = {OURS: lambda x: ops.concat_elu(x, rng, P), EAGER: eager}
        missing = {}
        if with_compile:
            sources[COMPILED] = torch.compile(eager, dynamic=False)
        else:
            missing[COMPILED] = NOT_COMPILED
        runs = {name: pass_of(op, (x,), both) for name, op in sources.items()}
        fused = FUSED_BYTES[both] * x.nbytes
        on_cuda = {OURS: HOST} if both else {}
        return Contest(
            runs,
            lambda: check(sources, x, rng, both),
            {n: counted_bytes(run) if n == EAGER else fused for n, run in runs.items()},
            dict.fromkeys(runs, ARITHMETIC) if device.type == "cpu" else on_cuda,
            missing,
        )

    size = "x".join(map(str, shape))
    title = f"concat_elu/{what}/{dtype_name(dtype)}/{size}" + ("" if dropout else "/no dropout")
    return Case(title, build, torch.Size(shape).numel(), **kw)


# Of the presets' flow digits-flowpp, and of the paper's networks on CIFAR-10.
SUITE_CASES = (
    case("forward+backward", (64, 32, 8, 4), quick=True),
    case("forward+backward", (64, 32, 8, 4), dropout=False),
    case("forward+backward", (4, 96, 32, 16), devices=("cpu",)),
    case("forward", (28, 96, 32, 16), devices=("cuda",)),
    case("forward+backward", (28, 96, 32, 16), devices=("cuda",)),
    case("forward+backward", (28, 96, 32, 16), torch.bfloat16, devices=("cuda",)),
    case("forward+backward", (28, 96, 32, 16), dropout=False, devices=("cuda",)),
)


def test_concat_elu(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
