"""Calls every op once per dtype on small, awkward shapes: a short program for memory checkers.

    compute-sanitizer --tool memcheck python benchmarks/exercise_ops.py --device cuda
    ncu --kernel-name regex:langevin python benchmarks/exercise_ops.py --large --device cuda

Results are compared with the plain-PyTorch reference, loosely: the test suite judges accuracy. The
reference runs on the CPU, so that a checker sees hardly any kernels but ours. With ``--large``
every kernel runs in float32 and bfloat16 on enough elements to fill a GPU, for profilers; the
mixture's at K = 32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import coopflow_ext as cf

SHAPES = ((1, 1), (3, 5), (2, 4), (5, 127), (2, 3, 8, 8), (1, 4099))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def misaligned(x: Tensor) -> Tensor:
    """A copy of x whose storage starts one element off a 16-byte boundary."""
    base = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return base[1:].view(x.shape).copy_(x)


def check(name: str, out: Tensor, expected: Tensor) -> None:
    # On CUDA a normal near zero may be off by 1e-3: approximate logarithms near 1.
    exact = 2e-3 if out.is_cuda else 1e-5
    tolerance = exact if out.dtype in (torch.float32, torch.float64) else 2e-2
    torch.testing.assert_close(
        out.cpu(),
        expected,
        rtol=tolerance,
        atol=tolerance,
        check_dtype=False,
        msg=lambda m: f"{name}: {m}",
    )


def reference(op: str, *args: Any, **options: Any) -> Any:
    """The op in plain PyTorch, on the CPU."""
    args, options = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, (args, options))
    return getattr(cf.reference, op)(*args, **options)


def exercise_noise(x: Tensor, rng: Tensor) -> None:
    for op in ("normal", "uniform"):
        out = getattr(cf.ops, op)(x.shape, rng, step=3, dtype=x.dtype)
        check(op, out, reference(op, x.shape, rng, step=3))


def exercise_langevin(x: Tensor, rng: Tensor) -> None:
    grad, batch = torch.randn_like(x), x.shape[0]
    table = torch.full((4, batch), 0.1, device=x.device)
    plain = {"drift": 0.3, "noise": 0.1, "clamp": (-1.0, 1.0), "step_clip": 0.2, "step": 2}
    full = {
        "drift": table, "noise": table, "decay": 0.1, "pull": 0.2, "x_ref": torch.ones_like(x),
        "grad_clip": 1.5, "grad_norm": 2.0, "clamp": (-1.0, 1.0), "noise_when": 1, "step": 1,
    }  # fmt: skip
    for options in (plain, full):
        expected = reference("langevin_step", x, grad, rng, **options)
        check("langevin_step", cf.ops.langevin_step(x, grad, rng, **options), expected)
        out = cf.ops.langevin_step_(x.clone(), grad, rng, **options)
        check("langevin_step_", out, expected)
        out = cf.ops.langevin_step_(misaligned(x), misaligned(grad), rng, **options)
        check("langevin_step_ (misaligned)", out, expected)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = torch.empty(batch, 5, dtype=work, device=x.device)
    active = torch.ones(batch, dtype=torch.bool, device=x.device)
    out = cf.ops.langevin_step_(
        x.clone(), grad, rng, **full, stats=stats, active=active, freeze_nonfinite=True
    )
    check("langevin_step_ (statistics)", out, expected)
    check("stats", stats[:, 0], grad.cpu().to(work).flatten(1).square().sum(1))
    numbers = torch.tensor([0.3, 0.1, 0, 0, inf, inf, 0.2, -1, 1], dtype=torch.float64)
    active, frozen_at = torch.ones_like(active), torch.zeros(batch, device=x.device).long()
    moved = x.clone()
    torch.ops.coopflow.langevin_plain_step_(moved, grad, rng, numbers, 2, active, frozen_at)
    check("langevin_plain_step_", moved, reference("langevin_step", x, grad, rng, **plain))
    out = cf.ops.langevin_noise_(x.clone(), rng, noise=0.1)
    check("langevin_noise_", out, reference("langevin_noise", x, rng, noise=0.1))


def exercise_affine_coupling(x: Tensor, _rng: Tensor) -> None:
    params = torch.randn(x.shape[0], 2, *x.shape[1:], device=x.device).tanh().to(x.dtype)
    for name in ("affine_coupling", "affine_coupling_inverse"):
        out, ladj = forward_and_backward(name, x, params)
        expected, expected_ladj = reference(name, x, params)
        check(name, out, expected)
        check(f"{name} ladj", ladj, expected_ladj)


def exercise_mixture_coupling(x: Tensor, _rng: Tensor) -> None:
    for components in (3, 4, 32):  # streaming, and in registers
        params = torch.randn(x.shape[0], 2 + 3 * components, *x.shape[1:], device=x.device)
        params[:, 0].tanh_()
        params = params.to(x.dtype)
        for name in ("mixture_logistic_coupling", "mixture_logistic_coupling_inverse"):
            out, ladj = forward_and_backward(name, x, params)
            expected, expected_ladj = reference(name, x.double(), params.double())
            if x.dtype in (torch.float32, torch.float64):
                # The inverse stretches rounding where the density is small, up to 100 times here.
                check(name, out / 100, expected / 100)
                check(f"{name} ladj", ladj / 100, expected_ladj / 100)


def forward_and_backward(name: str, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    x, params = x.clone().requires_grad_(), params.clone().requires_grad_()
    out, ladj = getattr(cf.ops, name)(x, params)
    (out.float().sum() + ladj.sum()).backward()
    return out.detach(), ladj.detach()


def exercise_large(device: torch.device, rng: Tensor) -> None:
    """Every kernel in each dtype, with nothing to compare."""
    batch = 1024 if device.type == "cuda" else 16
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(8 * batch, 3072, device=device).to(dtype)
        grad = torch.randn_like(x)
        cf.ops.langevin_step_(x, grad, rng, drift=0.1, noise=0.1, clamp=(-1.0, 1.0))
        stats = torch.empty(len(x), 5, device=device)
        cf.ops.langevin_step_(x, grad, rng, drift=0.1, noise=0.1, grad_norm=1.0, stats=stats)
        cf.ops.langevin_noise_(x, rng, noise=0.1)
        for op in ("normal", "uniform"):
            getattr(cf.ops, op)(x.shape, rng, dtype=dtype)
        half = x[:, :1536].contiguous()
        affine = torch.randn(len(x), 2, 1536, device=device).tanh().to(dtype)
        mixture = torch.randn(batch, 98, 1024, device=device).to(dtype)
        for inverse in ("", "_inverse"):
            forward_and_backward(f"affine_coupling{inverse}", half, affine)
            forward_and_backward(
                f"mixture_logistic_coupling{inverse}", half[:batch, :1024].contiguous(), mixture
            )


EXERCISES: tuple[Callable[[Tensor, Tensor], None], ...] = (
    exercise_noise,
    exercise_langevin,
    exercise_affine_coupling,
    exercise_mixture_coupling,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--large", action="store_true", help="large shapes, no comparison")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    rng = cf.Key(5, time=11).tensor(device)
    if args.large:
        exercise_large(device, rng)
        print("large shapes: done")
    else:
        for dtype in DTYPES:
            for shape in SHAPES:
                for exercise in EXERCISES:
                    exercise(torch.randn(shape, device=device).to(dtype), rng)
        print(f"{len(EXERCISES)} exercises, {len(SHAPES)} shapes, {len(DTYPES)} dtypes: right")
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
