"""The fused Langevin update beside what a user would write: noise and clamp at every step.

    pytest benchmarks/bench_langevin.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'langevin/*'

Bytes per element of size s that each variant moves: ours and the compiled step read x and the
gradient and write x, 3s. In-place eager: add_ 3s, normal_ s, add_ 3s, clamp_ 2s: 9s. Naive eager:
two products with temporaries 2s each, randn s, difference and sum 3s each, clamp 2s: 13s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Case, Contest, cuda_graph, dtype_name, run_pytest
from torch import Tensor

from coopflow_ext import Key, ops

DRIFT, NOISE, CLAMP = 0.1, 0.1, (-1.0, 1.0)
TORCHEBM = "torchebm's Triton step"


def plain_step(x: Tensor, grad: Tensor) -> Tensor:
    return (x - DRIFT * grad + NOISE * torch.randn_like(x)).clamp(*CLAMP)


@functools.cache
def compiled_step() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(plain_step, dynamic=False)


def torchebm_step(x: Tensor, grad: Tensor) -> Callable[[], Any] | str:
    """torchebm's Triton kernel, which it does not export; or why it cannot compete."""
    if x.dtype != torch.float32:
        return "for float32 only"
    try:
        from torchebm.cuda.fused_langevin import fused_langevin_step
    except ImportError as error:
        return f"not installed: {error}"
    # Its noise has the standard deviation noise_scale * sqrt(2 * step_size).
    scale = NOISE / math.sqrt(2 * DRIFT)
    return lambda: fused_langevin_step(x, grad, DRIFT, scale, clamp=CLAMP, out=x)


def contestants(
    x: Tensor, grad: Tensor, with_compile: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Every variant as a function that moves x in place."""
    rng, noise = Key(0).tensor(x.device), torch.empty_like(x)

    def in_place() -> None:
        x.add_(grad, alpha=-DRIFT).add_(noise.normal_(), alpha=NOISE).clamp_(*CLAMP)

    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: ops.langevin_step_(x, grad, rng, drift=DRIFT, noise=NOISE, clamp=CLAMP),
        "in-place eager": in_place,
        # Assigning .data is the loop's `x = step(x)`: no copy that the user would not make.
        "naive eager": lambda: setattr(x, "data", plain_step(x, grad)),
    }
    missing = {}
    if with_compile:
        compiled = compiled_step()
        runs["torch.compile"] = lambda: setattr(x, "data", compiled(x.detach(), grad))
    else:
        missing["torch.compile"] = "compilation was left out of this run"
    if x.is_cuda:
        start = x.clone()
        replay = cuda_graph(in_place)
        x.copy_(start)
        runs["CUDA graph of in-place"] = replay
        theirs = torchebm_step(x, grad)
        if isinstance(theirs, str):
            missing[TORCHEBM] = theirs
        else:
            runs[TORCHEBM] = theirs
    return runs, missing


def check(runs: dict[str, Callable[[], Any]], x: Tensor, grad: Tensor) -> None:
    """The residual of each variant is standard normal, to 5 sigma and rounding; clamps hold."""
    n = x.numel()
    start = torch.rand_like(x) * 0.6 - 0.3
    expected = start.double() - DRIFT * grad.double()
    # Three roundings of values below 1.
    rounding = 3 * torch.finfo(x.dtype).eps ** 2 / 12 / NOISE**2
    for name, run in runs.items():
        x.copy_(start)
        run()
        residual = (x.double() - expected) / NOISE
        inside = x.abs() < CLAMP[1]
        assert inside.double().mean() > 0.99, f"{name}: clamped too much"
        residual = residual[inside]
        mean, variance = residual.mean().item(), residual.var().item()
        assert abs(mean) <= 5 / math.sqrt(n) + torch.finfo(x.dtype).eps, f"{name}: mean {mean}"
        allowed = 5 * math.sqrt(2 / n) + rounding + 1e-3  # the clamped tail: under 1e-3
        assert abs(variance - 1) <= allowed, f"{name}: variance {variance}"
        x.fill_(3)
        run()
        assert bool((x == CLAMP[1]).all()), f"{name}: no clamp"
    x.copy_(start)


def case(
    batch: int, size: int, dtype: torch.dtype, *, quick: bool = False, cold: bool = False, **kw: Any
) -> Case:
    def build(device: torch.device, with_compile: bool) -> Contest:
        x = torch.rand(batch, size, device=device).to(dtype) - 0.5
        grad = torch.randn(batch, size, device=device).mul_(0.5).to(dtype)
        runs, missing = contestants(x, grad, with_compile)
        item = x.numel() * x.element_size()
        bytes_of = {"ours": 3, "torch.compile": 3, "in-place eager": 9, "naive eager": 13}
        bytes_of |= {"CUDA graph of in-place": 9, TORCHEBM: 3}
        return Contest(
            runs,
            lambda: check(runs, x, grad),
            {name: bytes_of[name] * item for name in runs},
            missing,
        )

    name = f"langevin/{dtype_name(dtype)}/{batch}x{size}" + ("/cold" if cold else "")
    return Case(name, build, batch * size, quick=quick, cold=cold, **kw)


SUITE_CASES = (
    case(256, 3072, torch.float32, quick=True),
    case(256, 3072, torch.bfloat16),
    case(1024, 2, torch.float32, quick=True),
    case(28, 3072, torch.float32),
    case(2048, 3072, torch.float32, cold=True),
    case(16384, 3072, torch.float32, cold=True, devices=("cuda",)),
    case(16384, 3072, torch.bfloat16, cold=True, devices=("cuda",)),
)


@pytest.mark.parametrize("case", SUITE_CASES, ids=lambda c: c.name)
def test_langevin(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
