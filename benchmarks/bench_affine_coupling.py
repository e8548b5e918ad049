"""The affine coupling with its log-determinant beside eager and compiled PyTorch.

    pytest benchmarks/bench_affine_coupling.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'affine_coupling/*'

Bytes per element of size s: ours and the compiled step read x, a, b and write y, 4s. Eager
forward: exp 2s, product 3s, sum 3s, sum over a chain s: 9s. Eager inverse: difference 3s, negation
2s, exp 2s, product 3s, sum over a chain s: 11s. Forward and backward: ours 4s, then reads x, a and
the gradient of y and writes three gradients, 6s; at least that for the compiled pass. What eager
moves in two passes, and with casts, is counted operator by operator (`harness.counted_bytes`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from harness import NOT_COMPILED, Case, Contest, counted_bytes, dtype_name, run_pytest
from torch import Tensor

from coopflow_ext import ops, reference

FORWARD, INVERSE = "affine_coupling", "affine_coupling_inverse"
FUSED_BYTES = {"forward": 4, "inverse": 4, "forward+backward": 10}
ARITHMETIC = "arithmetic: the exponential"
CASTS = "arithmetic: the exponential and the conversions of bfloat16"
HOST = "the host's part of autograd: the kernels alone reach 82% of the memory's peak or more"
Op = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@functools.cache
def compiled(name: str) -> Op:
    return torch.compile(getattr(reference, name), dynamic=False)


def pass_of(op: Op, x: Tensor, params: Tensor, backward: bool) -> Callable[[], Any]:
    if not backward:

        def run() -> Any:
            with torch.no_grad():
                return op(x, params)

        return run
    x, params = x.clone().requires_grad_(), params.clone().requires_grad_()
    weights = torch.randn_like(x)

    def run_both() -> Any:
        out, ladj = op(x, params)
        return torch.autograd.grad(
            (out, ladj), (x, params), grad_outputs=(weights.to(out.dtype), torch.ones_like(ladj))
        )

    return run_both


def check(name: str, ops_of: dict[str, Op], x: Tensor, params: Tensor, backward: bool) -> None:
    """Results and gradients of every variant against the reference in float64."""

    def results(op: Op, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(backward) for t in (x, params)]
        out, ladj = op(*leaves)
        both = [out, ladj]
        if backward:
            loss = (out.double() * weights).sum() + ladj.double().sum()
            both += torch.autograd.grad(loss, leaves)
        return [t.detach().double() for t in both]

    weights = torch.randn_like(x, dtype=torch.float64)
    expected = results(getattr(reference, name), torch.float64)
    eps = torch.finfo(x.dtype).eps
    for variant, op in ops_of.items():
        for i, (ours, theirs) in enumerate(zip(results(op, x.dtype), expected, strict=True)):
            scale = theirs.abs().max().item()
            torch.testing.assert_close(
                ours, theirs, rtol=16 * eps, atol=16 * eps * scale,
                msg=lambda text, v=variant, i=i: f"{v}, result {i}: {text}",
            )  # fmt: skip


def case(
    what: str, batch: int, size: int, dtype: torch.dtype = torch.float32, *, quick: bool = False,
    cold: bool = False, **kw: Any,
) -> Case:  # fmt: skip
    name, backward = (INVERSE if what == "inverse" else FORWARD), what == "forward+backward"

    def build(device: torch.device, with_compile: bool) -> Contest:
        x = torch.randn(batch, size, device=device).to(dtype)
        params = torch.randn(batch, 2, size, device=device).tanh_().to(dtype)
        ops_of: dict[str, Op] = {"ours": getattr(ops, name), "eager": getattr(reference, name)}
        missing = {}
        if with_compile:
            ops_of["torch.compile"] = compiled(name)
        else:
            missing["torch.compile"] = NOT_COMPILED
        fused = FUSED_BYTES[what] * x.numel() * x.element_size()
        runs = {n: pass_of(op, x, params, backward) for n, op in ops_of.items()}
        reason = ARITHMETIC if dtype == torch.float32 else CASTS
        on_cuda = {"ours": HOST} if backward else {}
        return Contest(
            runs,
            lambda: check(name, ops_of, x, params, backward),
            {n: counted_bytes(run) if n == "eager" else fused for n, run in runs.items()},
            dict.fromkeys(runs, reason) if device.type == "cpu" else on_cuda,
            missing,
        )

    title = f"affine_coupling/{what}/{dtype_name(dtype)}/{batch}x{size}" + ("/cold" if cold else "")
    return Case(title, build, batch * size, quick=quick, cold=cold, **kw)


SUITE_CASES = (
    case("forward", 256, 1536, quick=True),
    case("inverse", 256, 1536, quick=True),
    case("forward+backward", 256, 1536, quick=True),
    case("forward", 128, 32),
    case("forward", 256, 1536, torch.bfloat16),
    case("forward", 4096, 1536, cold=True, devices=("cpu",)),
    case("forward", 8192, 1536, cold=True, devices=("cuda",)),
    case("inverse", 8192, 1536, cold=True, devices=("cuda",)),
    case("forward+backward", 8192, 1536, cold=True, devices=("cuda",)),
    case("forward", 8192, 1536, torch.bfloat16, cold=True, devices=("cuda",)),
)


def test_affine_coupling(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
