"""The fused Langevin update beside what a user would write: noise and clamp at every step.

    pytest benchmarks/bench_langevin.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'langevin/*'

Bytes per element of size s that each variant moves: ours and the compiled step read x and the
gradient and write x, 3s. In-place eager: add_ 3s, normal_ s, add_ 3s, clamp_ 2s: 9s. Naive eager:
two products with temporaries 2s each, randn s, difference and sum 3s each, clamp 2s: 13s. Compiled
with the noise drawn before: normal_ s, then x, gradient and noise read and x written, 5s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from harness import NOT_COMPILED, Case, Contest, add_graph, dtype_name, run_pytest
from torch import Tensor

from coopflow_ext import Key, ops

DRIFT, NOISE, CLAMP = 0.1, 0.1, (-1.0, 1.0)
COMPILED, DRAWN_BEFORE = "torch.compile", "torch.compile, noise drawn before"
GRAPH, COMPILED_GRAPH = "CUDA graph of in-place", "CUDA graph of torch.compile"
TORCHEBM = "torchebm's Triton step"
BYTES = {
    "ours": 3, "in-place eager": 9, "naive eager": 13, COMPILED: 3, DRAWN_BEFORE: 5,
    GRAPH: 9, COMPILED_GRAPH: 3, TORCHEBM: 3,
}  # fmt: skip
ONE_THREAD = "normal_ and randn draw on one thread"
ON_CPU = {
    "ours": "arithmetic: 15 AVX2 instructions per element, most of them for the normals",
    "in-place eager": ONE_THREAD,
    "naive eager": ONE_THREAD,
    COMPILED: "the compiler's noise on a CPU is drawn element by element, not vectorised",
    DRAWN_BEFORE: ONE_THREAD,
}


def free_step(x: Tensor, grad: Tensor) -> Tensor:
    """Without the clamp."""
    return x - DRIFT * grad + NOISE * torch.randn_like(x)


@functools.cache
def compiled_step() -> Callable[[Tensor, Tensor], Tensor]:
    """In place, so that nothing is allocated; one kernel on a GPU."""
    return torch.compile(lambda x, grad: x.copy_(free_step(x, grad).clamp(*CLAMP)), dynamic=False)


@functools.cache
def compiled_update() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same with the noise given: what the compiler makes of drawing it is slow on a CPU."""

    def update(x: Tensor, grad: Tensor, noise: Tensor) -> Tensor:
        return x.copy_((x - DRIFT * grad + NOISE * noise).clamp(*CLAMP))

    return torch.compile(update, dynamic=False)


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
        # The loop's `x = step(x)`: its last operation writes what it would write anyway, but to x.
        "naive eager": lambda: torch.clamp(free_step(x, grad), *CLAMP, out=x),
    }
    missing: dict[str, str] = {}
    if with_compile:
        step, update = compiled_step(), compiled_update()
        runs[COMPILED] = lambda: step(x, grad)
        runs[DRAWN_BEFORE] = lambda: update(x, grad, noise.normal_())
    else:
        missing |= {COMPILED: NOT_COMPILED, DRAWN_BEFORE: NOT_COMPILED}
    if x.is_cuda:
        add_graph(GRAPH, in_place, runs, missing)
        if with_compile:
            add_graph(COMPILED_GRAPH, runs[COMPILED], runs, missing)
        theirs = torchebm_step(x, grad)
        if isinstance(theirs, str):
            missing[TORCHEBM] = theirs
        else:
            runs[TORCHEBM] = theirs
    return runs, missing


def check(runs: dict[str, Callable[[], Any]], x: Tensor, grad: Tensor) -> None:
    """The residual of each variant is standard normal, to 5 sigma and rounding; clamps hold.

    torch 2.10 and 2.11 draw half-precision normals of variance 0.985 on a CPU: theirs may have it.
    """
    n = x.numel()
    torchs_variance = torch.empty_like(x).normal_().double().var().item()
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
        wanted = (1.0,) if name == "ours" else (1.0, torchs_variance)
        assert min(abs(variance - w) for w in wanted) <= allowed, f"{name}: variance {variance}"
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
        return Contest(
            runs,
            lambda: check(runs, x, grad),
            {name: BYTES[name] * item for name in runs},
            ON_CPU if device.type == "cpu" else {},
            missing,
            own_memory=frozenset((GRAPH, COMPILED_GRAPH)),
            in_place=(x,),
        )

    name = f"langevin/{dtype_name(dtype)}/{batch}x{size}" + ("/cold" if cold else "")
    return Case(name, build, batch * size, quick=quick, cold=cold, **kw)


SUITE_CASES = (
    case(256, 3072, torch.float32, quick=True),
    case(256, 3072, torch.bfloat16),
    case(256, 3072, torch.float16),
    case(1024, 2, torch.float32, quick=True),
    case(28, 3072, torch.float32),
    case(2048, 3072, torch.float32, cold=True),
    case(16384, 3072, torch.float32, cold=True, devices=("cuda",)),
    case(16384, 3072, torch.bfloat16, cold=True, devices=("cuda",)),
)


def test_langevin(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
