"""Calls every op of op_table.py on small, awkward shapes: a short program for memory checkers.

    compute-sanitizer --tool memcheck python benchmarks/exercise_ops.py --device cuda
    ncu --kernel-name regex:langevin python benchmarks/exercise_ops.py --large --device cuda

Results are compared with the plain-PyTorch reference, loosely: the test suite judges accuracy. The
reference runs on the CPU, so that a checker sees hardly any kernels but ours. With ``--large``
every kernel runs in float32 and bfloat16 on enough elements to fill a GPU, for profilers; the
mixture's at K = 32.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from op_table import DTYPES, OPS, Arguments, Draw, Op
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import coopflow_ext as cf

SHAPES = ((1, 1), (3, 5), (2, 4), (5, 127), (2, 3, 8, 8), (1, 4099))


def misaligned(x: Tensor) -> Tensor:
    """A copy whose storage starts one element off a 16-byte boundary."""
    base = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return base[1:].view(x.shape).copy_(x)


def exercise(op: Op, draw: Draw) -> None:
    """The op and its derivative, of aligned and of misaligned arguments."""
    arguments = op.arguments(draw)
    expected = op.reference(arguments)
    for given in (arguments, tree_map_only(Tensor, misaligned, arguments)):
        op.assert_close(forward_and_backward(op, given), expected)


def forward_and_backward(op: Op, arguments: Arguments) -> tuple[Tensor, ...]:
    given = {name: arguments[name] for name in op.differentiable}
    given = tree_map(lambda t: t.clone().requires_grad_(), given)
    results = op({**arguments, **given})
    if given:
        torch.autograd.grad(results, tree_leaves(given), [torch.ones_like(t) for t in results])
    return results


def exercise_outputs_of_a_step(draw: Draw) -> None:
    """Statistics and masks, and the step with its numbers in one tensor."""
    x, grad, rng = draw.normal(), draw.normal(), draw.rng()
    batch, device = draw.shape[0], draw.device
    work = torch.float64 if draw.dtype == torch.float64 else torch.float32
    stats = torch.empty(batch, 5, dtype=work, device=device)
    active = torch.ones(batch, dtype=torch.bool, device=device)
    frozen_at = torch.zeros(batch, dtype=torch.int64, device=device)
    options = {"drift": 0.3, "noise": 0.1, "clamp": (-1.0, 1.0), "step_clip": 0.2}
    step = 2
    masked = {"active": active, "freeze_nonfinite": True}
    expected = cf.ops.langevin_step_(
        x.clone(), grad, rng, **options, **masked, step=step, stats=stats
    )
    squares = grad.cpu().to(work).flatten(1).square().sum(1)
    torch.testing.assert_close(stats[:, 0].cpu(), squares, rtol=1e-5, atol=1e-5)
    moved = x.clone()
    rows = torch.empty(4, *stats.shape, dtype=work, device=device)
    bound = cf.ops.BoundStep(**options, **masked, stats=rows, frozen_at=frozen_at)
    bound.in_place(moved, rng)(grad, step)
    assert torch.equal(moved, expected), "langevin_bound_step_ is another step"
    assert torch.equal(rows[step], stats), "langevin_bound_step_ writes other statistics"


def energies_of(dim: int) -> dict[str, tuple[list[Tensor], list[float]]]:
    """What every energy in closed form is given, in float64."""
    ones = torch.ones(3, dim, dtype=torch.float64)
    mean, log_weights = ones[0].clone(), ones[:, 0].clone()
    return {
        "double_well": ([], [0.7]),
        "funnel": ([], [1.5]),
        "gaussian": ([mean, torch.eye(dim, dtype=torch.float64), log_weights[0]], []),
        "gaussian_mixture": ([ones.cumsum(0), ones, log_weights], []),
        "rastrigin": ([], [1.2]),
        "rosenbrock": ([], [0.9, 3.0]),
    }


def exercise_whole_chains(draw: Draw) -> None:
    """Chains of every energy in closed form, plain and with every output, against each other."""
    if draw.dtype not in (torch.float32, torch.float64) or len(draw.shape) != 2:
        return
    batch, dim = draw.shape[0], min(draw.shape[1], 40)
    x0, rng = draw.normal(batch, dim).to(draw.device, draw.dtype), draw.rng()
    for name, (tensors, numbers) in energies_of(dim).items():
        if dim < 2 and name in ("funnel", "rosenbrock"):
            continue
        given = [t.to(draw.device, draw.dtype) for t in tensors]
        options = {"energy": name, "numbers": numbers, "n_steps": 3, "drift": 0.01, "noise": 0.1}
        plain = cf.ops.analytic_langevin_chain(x0, rng, tensors=given, **options)
        full = cf.ops.analytic_langevin_chain(
            misaligned(x0), rng, tensors=[misaligned(t) for t in given], **options, thin=2,
            stats=True, freeze_nonfinite=True,
        )  # fmt: skip
        assert torch.equal(plain.x, full.x), f"{name}: statistics change the chain"
        options = {"energy": name, "numbers": numbers, "n_steps": 3, "step_size": 0.3}
        plain = cf.ops.analytic_mala_chain(x0, rng, rng, tensors=given, **options)
        full = cf.ops.analytic_mala_chain(
            misaligned(x0), rng, rng, tensors=[misaligned(t) for t in given], **options, thin=2,
            stats=True,
        )  # fmt: skip
        assert torch.equal(plain.x, full.x), f"{name}: statistics change the chain"


def exercise_networks(dtype: torch.dtype, device: torch.device) -> None:
    """Whole chains of networks: tiles that are full and that are not, layers of any width."""
    for batch, sizes in ((1, (1, 1)), (19, (5, 20, 9)), (40, (8, 64, 64, 3, 17))):
        draw = Draw((batch, sizes[0]), dtype, device=device)
        layers = tuple(itertools.pairwise((*sizes, 1)))
        network = {
            "weights": [
                (draw.normal(n_out, n_in) / n_in**0.5).to(device, dtype) for n_in, n_out in layers
            ],
            "biases": [draw.normal(n_out).to(device, dtype) for _, n_out in layers],
        }
        proposed = cf.ops.mlp_mala_chain(
            draw.normal(), **network, rng=draw.rng(), accept_rng=draw.rng(), activation="tanh",
            n_steps=2, step_size=0.3, thin=1, stats=True,
        )  # fmt: skip
        assert proposed.trajectory is not None
        assert torch.equal(proposed.x, proposed.trajectory[-1])
        given = {"x0": draw.normal(), "rng": draw.rng(), "x_ref": draw.normal(), **network}
        options = {"activation": "tanh", "n_steps": 2, "drift": 0.1, "noise": 0.1, "pull": 0.1}
        on_cpu = tree_map(lambda v: v.cpu().double() if v.is_floating_point() else v.cpu(), given)
        expected, *_ = cf.reference.mlp_langevin_chain(**on_cpu, **options)
        for bfloat16, bound in ((False, 2e-3), (True, 5e-2)):
            x = cf.ops.mlp_langevin_chain(
                **given, **options, thin=1, stats=True, bfloat16=bfloat16
            ).x
            torch.testing.assert_close(x.cpu().double(), expected, rtol=bound, atol=bound)


def exercise_large(device: torch.device) -> None:
    """Every kernel, with nothing to compare."""
    scale = 1 if device.type == "cuda" else 64
    for dtype in (torch.float32, torch.bfloat16):
        for op in OPS:
            if op.variant.startswith(("K3", "K4")):
                continue
            rows, columns = (1024, 1024) if op.variant == "K32" else (8192, 3072)
            forward_and_backward(
                op, op.arguments(Draw((rows // scale, columns), dtype, device=device))
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--large", action="store_true", help="large shapes, no comparison")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.large:
        exercise_large(device)
        print("large shapes: done")
    else:
        for dtype, _ in DTYPES:
            for shape in SHAPES:
                draw = Draw(shape, dtype, device=device)
                for op in OPS:
                    exercise(op, draw)
                exercise_outputs_of_a_step(draw)
                exercise_whole_chains(draw)
            if dtype == torch.float32 or (dtype == torch.float64 and device.type == "cpu"):
                exercise_networks(dtype, device)
        print(f"{len(OPS)} calls, {len(SHAPES)} shapes, {len(DTYPES)} dtypes: right")
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
