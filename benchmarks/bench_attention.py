"""Attention with dropout by key beside plain PyTorch, which has scores and mask in memory.

    pytest benchmarks/bench_attention.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'attention/*'

"scores in memory" is the formula with the same mask, drawn by `ops.uniform`: what the flows did
before there was an op. "torch's dropout" is torch's own attention with its own generator, which
draws another mask at each call, for orientation; on a CPU it has the scores in memory, too.

Floating-point operations are those of the products that both passes need: two forward, and in the
backward pass the scores again and four more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import plain
import torch
from harness import NOT_COMPILED, OURS, Case, Contest, dtype_name, pass_of, run_pytest
from torch import Tensor
from torch.nn import functional

from coopflow_ext import Key, ops, reference

P = 0.2
PLAIN, TORCH, COMPILED = "scores in memory", "torch's dropout", "torch.compile"
Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(
    batch: int, heads: int, length: int, dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one projection (B, L, 3, H, d), as the flows have them."""
    g = torch.Generator().manual_seed(0)
    projected = torch.randn((batch, length, 3, heads, dim), generator=g).to(device, dtype)
    q, k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def check(sources: dict[str, Op], given: tuple[Tensor, ...], rng: Tensor, backward: bool) -> None:
    """Results and gradients of every source with our mask against the reference in float64."""

    def results(op: Op, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(backward) for t in given]
        out = op(*leaves)
        found = [out, *torch.autograd.grad(out.sin().sum(), leaves)] if backward else [out]
        return [t.detach().double() for t in found]

    def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, rng, P)

    expected = results(exactly, torch.float64)
    bound = max(1e-5, 8 * torch.finfo(given[0].dtype).eps)
    for source, op in sources.items():
        for i, (got, wanted) in enumerate(zip(results(op, given[0].dtype), expected, strict=True)):
            torch.testing.assert_close(
                got, wanted, rtol=0, atol=bound * wanted.abs().max().item(),
                msg=lambda text, s=source, i=i: f"{s}, result {i}: {text}",
            )  # fmt: skip


def case(
    what: str,
    batch: int,
    heads: int,
    length: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    **kw: Any,
) -> Case:
    both = what == "forward+backward"

    def build(device: torch.device, with_compile: bool) -> Contest:
        given = inputs(batch, heads, length, dim, device, dtype)
        rng = Key(0).tensor(device)
        in_memory = partial(plain.attention, rng=rng, p=P)
        sources: dict[str, Op] = {
            OURS: lambda q, k, v: ops.attention(q, k, v, rng, P),
            PLAIN: in_memory,
        }
        missing = {}
        if with_compile:
            sources[COMPILED] = torch.compile(in_memory, dynamic=False)
        else:
            missing[COMPILED] = NOT_COMPILED
        with_mask = dict(sources)
        sources[TORCH] = partial(functional.scaled_dot_product_attention, dropout_p=P)
        products = 7 if both else 2
        return Contest(
            {name: pass_of(op, given, both) for name, op in sources.items()},
            lambda: check(with_mask, given, rng, both),
            missing=missing,
            flops=2 * products * batch * heads * length**2 * dim,
            low_precision=dtype == torch.bfloat16,
        )

    title = f"attention/{what}/{dtype_name(dtype)}/{batch}x{heads}x{length}x{dim}"
    return Case(title, build, batch * heads * length * dim, **kw)


# Of the presets' flows digits-flowpp and patches-flowpp, of the paper's networks on CIFAR-10, and
# of the longest vectors.
SUITE_CASES = (
    case("forward", 64, 4, 32, 8),
    case("forward+backward", 64, 4, 32, 8, quick=True),
    case("forward+backward", 16, 4, 128, 6),
    case("forward", 4, 4, 512, 24, devices=("cpu",)),
    case("forward+backward", 4, 4, 512, 24, devices=("cpu",)),
    case("forward+backward", 4, 4, 512, 24, torch.bfloat16, devices=("cpu",)),
    case("forward", 28, 4, 512, 24, devices=("cuda",)),
    case("forward+backward", 28, 4, 512, 24, devices=("cuda",)),
    case("forward+backward", 28, 4, 512, 24, torch.bfloat16, devices=("cuda",)),
    case("forward+backward", 4, 8, 1024, 64, devices=("cuda",)),
)


def test_attention(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
