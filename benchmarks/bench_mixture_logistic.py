"""The mixture-of-logistics coupling beside plain PyTorch: the published formulas and bisection.

    pytest benchmarks/bench_mixture_logistic.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'mixture_logistic/*'

The inverse that is published (``plain.py``) bisects over the whole batch and reads the host at each
iteration, so it cannot be compiled as a whole; "torch.compile" there compiles the evaluation of the
mixture, which is nearly all of an iteration.

Bytes: ours and the compiled forward read x, a, b, three parameters of each component, and write y.
What the others move is counted operator by operator (`harness.counted_bytes`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import plain
import torch
from harness import NOT_COMPILED, OURS, Case, Contest, counted_bytes, dtype_name, run_pytest
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext import reference

Op = Callable[..., tuple[Tensor, Tensor]]
FORWARD, INVERSE = "mixture_logistic_coupling", "mixture_logistic_coupling_inverse"
COMPILED = "torch.compile"
PUBLISHED = "published bisection"
ON_CPU = "arithmetic: exponentials and logarithms of every component"
SLOWEST = "arithmetic: a warp evaluates until its slowest element has its root"
BISECTING = "host reads and launches at every iteration"
ON_CUDA = {"inverse": {OURS: SLOWEST, PUBLISHED: BISECTING}}


def inputs(
    elements: int, components: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A batch of chains of 1,024 elements, with parameters as a trained flow has them."""
    g = torch.Generator().manual_seed(0)
    shape = (max(1, elements // 1024), min(elements, 1024))

    def normal(rows: int) -> Tensor:
        return torch.randn((shape[0], rows, shape[1]), generator=g)

    parts = (normal(1).tanh(), normal(1), normal(components), 2 * normal(components))
    params = torch.cat((*parts, normal(components) - 1.5), dim=1)
    return torch.randn(shape, generator=g).to(device, dtype), params.to(device, dtype)


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


@functools.cache
def compiled_forward(dynamic: bool | None = False) -> Op:
    """For one shape of the arguments, or for several with ``dynamic`` None."""
    return torch.compile(reference.mixture_logistic_coupling, dynamic=dynamic)


@functools.cache
def compiled_inverse(dynamic: bool | None = False) -> Op:
    evaluate = torch.compile(plain.mixture_logistic_log_cdf, dynamic=dynamic)

    def inverse(y: Tensor, params: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        with mock.patch.object(plain, "mixture_logistic_log_cdf", evaluate):
            return plain.mixture_logistic_coupling_inverse(y, params, **options)

    return inverse


# --- checks ---------------------------------------------------------------------------------------


def check_forward(sources: dict[str, Op], x: Tensor, params: Tensor, backward: bool) -> None:
    """Results and gradients of every source against the published formulas in float64."""

    def results(op: Op, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(backward) for t in (x, params)]
        out, ladj = op(*leaves)
        both = [out, ladj]
        if backward:
            both += torch.autograd.grad(out.double().sum() + ladj.double().sum(), leaves)
        return [t.detach().double() for t in both]

    expected = results(reference.mixture_logistic_coupling, torch.float64)
    # Rounding of the result, and that of t = (x − μ)·e^{−s} in the sums of K terms.
    eps = torch.finfo(x.dtype).eps
    for source, op in sources.items():
        for i, (got, wanted) in enumerate(zip(results(op, x.dtype), expected, strict=True)):
            scale = max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(
                got, wanted, rtol=max(1e-4, 2 * eps), atol=max(2e-5, eps) * scale,
                msg=lambda text, s=source, i=i: f"{s}, result {i}: {text}",
            )  # fmt: skip


def check_inverse(sources: dict[str, Op], y: Tensor, params: Tensor) -> None:
    """Every source's x is mapped back to y, in float64.

    Ours everywhere; bisection in 99% of the elements, as it stops where rounding holds it. Where a
    mixture is flat, x is what rounding makes of it, and the log-determinant with it.
    """
    for source, op in sources.items():
        x, ladj = op(y, params)
        back, forward_ladj = reference.mixture_logistic_coupling(x.double(), params.double())
        error = (back - y).abs() / (1 + y.abs())
        worst = error.max() if source == OURS else error.flatten().quantile(0.99)
        limit = 1e-4 if source == OURS else 1e-2
        assert worst.item() <= limit, f"{source}: maps back with an error of {worst.item():.2g}"
        off = (ladj + forward_ladj).abs().max().item() / y[0].numel()
        assert off <= 10 * limit, f"{source}: log-determinant off by {off:.2g} per element"


# --- cases ----------------------------------------------------------------------------------------


def case(
    what: str,
    elements: int,
    components: int,
    dtype: torch.dtype = torch.float32,
    *,
    quick: bool = False,
    **kw: Any,
) -> Case:
    """Ours, the published formulas or bisection, and what can be compiled of them."""
    name, both = (INVERSE if what == "inverse" else FORWARD), what == "forward+backward"

    def build(device: torch.device, with_compile: bool) -> Contest:
        x, params = inputs(elements, components, device, dtype)
        inverse = what == "inverse"
        argument = cf.ops.mixture_logistic_coupling(x, params)[0] if inverse else x
        other = PUBLISHED if inverse else "eager"
        theirs = plain.mixture_logistic_coupling_inverse if inverse else getattr(reference, name)
        sources: dict[str, Op] = {OURS: getattr(cf.ops, name), other: theirs}
        missing = {}
        if with_compile:
            sources[COMPILED] = compiled_inverse() if inverse else compiled_forward()
        else:
            missing[COMPILED] = NOT_COMPILED

        def check() -> None:
            if inverse:
                check_inverse(sources, argument, params)
            else:
                check_forward(sources, argument, params, both)

        runs = {n: pass_of(op, argument, params, both) for n, op in sources.items()}
        fused = 2 * x.nbytes + params.nbytes
        if both:  # and once more, with the gradient of y in and those of x and params out
            fused += 3 * x.nbytes + 2 * params.nbytes
        expected = {OURS: fused, other: counted_bytes(runs[other])}
        if not inverse and with_compile:
            expected[COMPILED] = fused
        on_cpu = device.type == "cpu"
        reasons = dict.fromkeys(runs, ON_CPU) if on_cpu else ON_CUDA.get(what, {})
        return Contest(runs, check, expected, reasons, missing)

    title = f"mixture_logistic/{what}/{dtype_name(dtype)}/K{components}/{elements}"
    return Case(title, build, elements, quick=quick, **kw)


SUITE_CASES = (
    case("forward", 2**9, 32),
    case("inverse", 2**9, 32),
    case("forward", 2**14, 32),
    case("inverse", 2**14, 32, quick=True),
    case("forward+backward", 2**14, 32, quick=True),
    case("forward", 2**14, 8),
    case("inverse", 2**14, 8),
    case("forward", 2**14, 32, torch.bfloat16),
    case("forward", 2**18, 32, devices=("cpu",)),
    case("forward", 2**20, 32, devices=("cuda",)),
    case("inverse", 2**20, 32, devices=("cuda",)),
    case("forward+backward", 2**20, 32, devices=("cuda",)),
    case("forward", 2**20, 32, torch.bfloat16, devices=("cuda",)),
    case("inverse", 28 * 1024, 32, devices=("cuda",)),
)


def test_mixture_logistic(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
