"""Random calls of ops and samplers, right and wrong: none may crash the process, every refusal is a
ValueError or a TypeError that leaves the arguments as they were, and right calls are answered
right.

    python -X faulthandler tests/fuzz.py --calls 1000000 --seed 1

``tests/test_fuzz.py`` drives the same calls by hypothesis, which shrinks what fails.
"""

from __future__ import annotations

import argparse
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from op_table import DTYPES, MIXED_DTYPES, OPS, Arguments, Draw, Op, as_tuple
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext.errors import NonFiniteError

REFUSALS = (ValueError, TypeError, OverflowError, NonFiniteError)
NUMBERS = [math.nan, math.inf, -math.inf, 0, -1, 1, 2, 3, 0.5, 1e-320, 1e300, 2**40, 2**70]
OTHERS = [None, "a", [], [1.0], (1, 2), {}, True, 1j, torch.float32, object()]


def right_arguments(chance: random.Random) -> tuple[Op, Arguments]:
    op = chance.choice(OPS)
    dims = [chance.choice((0, 1, 2, 3, 5, 8)) for _ in range(chance.choice((0, 1, 1, 2, 3)))]
    shape = (chance.choice((0, 1, 2, 3, 5)), *dims)
    pairs = DTYPES + MIXED_DTYPES if op.is_coupling else DTYPES
    draw = Draw(shape, *chance.choice(pairs))
    draw.generator.manual_seed(chance.getrandbits(40))
    return op, op.arguments(draw)


def _poisoned(t: Tensor, chance: random.Random) -> Tensor:
    t = t.clone(memory_format=torch.contiguous_format)
    if t.is_floating_point() and t.numel():
        t.reshape(-1)[chance.randrange(t.numel())] = chance.choice(NUMBERS[:10])
    return t


def _slice_of_larger(t: Tensor, chance: random.Random) -> Tensor:
    """The same values with gaps between them."""
    if t.ndim == 0:
        return t
    dim = chance.randrange(t.ndim)
    return torch.repeat_interleave(t, 2, dim).narrow(dim, 0, 2 * t.shape[dim])[
        (slice(None),) * dim + (slice(None, None, 2),)
    ]


def _reshaped(t: Tensor, chance: random.Random) -> Tensor:
    dim = chance.randrange(t.ndim + 1)
    if chance.random() < 0.5 or dim == t.ndim:
        return t.unsqueeze(dim)
    return t.narrow(dim, 0, max(0, t.shape[dim] - 1))


CHANGES: list[Callable[[Tensor, random.Random], Any]] = [
    _poisoned,
    _slice_of_larger,
    _reshaped,
    lambda t, chance: t.to(chance.choice((torch.float64, torch.bfloat16, torch.int64, torch.bool))),
    lambda t, _: t.mT.contiguous().mT if t.ndim > 1 else t,
    lambda t, _: t[:1].expand(t.shape) if t.ndim and t.shape[0] else t,
    lambda t, _: t.to("meta"),
    lambda t, _: t.to_sparse() if t.ndim else t,
    lambda t, _: torch._neg_view(t) if t.is_floating_point() else t,
    lambda t, _: t.detach().requires_grad_() if t.is_floating_point() else t,
    lambda t, _: t.numpy() if t.dtype != torch.bfloat16 else t.tolist(),
    lambda t, chance: chance.choice(OTHERS),
]


def changed(value: Any, chance: random.Random) -> Any:
    """Something else in its place, often of the same kind."""
    if isinstance(value, Tensor):
        return chance.choice(CHANGES)(value, chance)
    return chance.choice(NUMBERS if chance.random() < 0.7 else OTHERS)


def copies(arguments: Arguments) -> Arguments:
    return {
        name: value.clone() if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in arguments.items()
    }


def assert_unchanged(arguments: Arguments, before: Arguments) -> None:
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_meta and not value.is_sparse:
            assert torch.equal(
                value.detach().nan_to_num(9.0), before[name].detach().nan_to_num(9.0)
            ), f"{name} was changed by a call that was refused"


def call_of_an_op(chance: random.Random) -> None:
    op, arguments = right_arguments(chance)
    count = min(chance.choice((0, 0, 1, 1, 2)), len(arguments))
    names = chance.sample(sorted(arguments), count)
    for name in names:
        arguments[name] = changed(arguments[name], chance)
    before = copies(arguments)
    try:
        results = as_tuple(getattr(cf.ops, op.name)(**arguments))
    except REFUSALS:
        assert names, f"{op} refused what is right: {arguments}"
        assert_unchanged(arguments, before)
        return
    assert_unchanged({k: v for k, v in arguments.items() if k != "x"}, before)
    if not names:
        # The bounds are of one draw; of 21,452 of attention in double the furthest lay at 1.41.
        op.assert_close(tuple(t.detach() for t in results), expected(op, before), slack=1.5)


def expected(op: Op, arguments: Arguments) -> tuple[Tensor, ...]:
    """The reference's results, save attention's of doubles, where it rounds as the op does."""
    if op.name == "attention" and arguments["q"].dtype == torch.float64 and arguments["q"].numel():
        return (extended_attention(**arguments),)
    return op.reference(arguments)


def extended_attention(q: Tensor, k: Tensor, v: Tensor, rng: Tensor, p: float, step: int) -> Tensor:
    """``reference.attention`` in extended precision, rounded once."""
    wide_q, wide_k, wide_v = (t.detach().cpu().numpy().astype(np.longdouble) for t in (q, k, v))
    scores = wide_q @ wide_k.swapaxes(-1, -2) * np.longdouble(q.shape[-1] ** -0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    kept = cf.reference.uniform(weights.shape, rng.cpu(), step=step).numpy() >= p
    wide = (weights * kept / np.longdouble(1 - p)) @ wide_v
    return torch.from_numpy(wide.astype(np.float64))


OPTIONS: dict[str, list[Any]] = {
    "n_steps": [0, 1, 3, 7],
    "step_size": [0.1, [0.1, 0.2, 0.3]],
    "drift": [0.1, 0.0, torch.rand(1, 3)],
    "noise": [0.0, 0.3],
    "temperature": [0.5, lambda k: 0.1 * k],
    "grad_clip": [0.5],
    "grad_norm": [1.0, 1e30],
    "step_clip": [0.1],
    "clamp": [(-1.0, 1.0), (0.5, 0.5)],
    "clamp_when": ["step", "end", "noise", "both"],
    "noise_before_gradient": [True, False],
    "reference_std": [1.5],
    "return_trajectory": [True],
    "thin": [1, 2],
    "stats": [True],
    "on_nonfinite": ["raise", "freeze", "ignore"],
    "autocast": [torch.bfloat16],
    "kernel": [True, False, "auto"],
    "differentiable": [True, "last", False],
    "negative_energy": [True],
}


def _sum(x: Tensor) -> Tensor:
    return x.sum(tuple(range(1, x.ndim))) if x.ndim > 1 else x


ENERGIES: list[Any] = [
    lambda x: _sum(x * x),
    lambda x: _sum(x)[:, None] * math.nan,
    lambda x: x,
    lambda x: x.sum(),
    cf.energies.DoubleWellEnergy(1.0),
    cf.energies.FunnelEnergy(2),
]


def call_of_a_sampler(chance: random.Random) -> None:
    names = ["n_steps", *chance.sample(sorted(OPTIONS), chance.randrange(5))]
    options = {name: chance.choice(OPTIONS[name]) for name in names}
    if chance.random() < 0.4:
        name = chance.choice(sorted(options))
        options[name] = changed(options[name], chance)
        if name == "n_steps" and isinstance(options[name], int):
            options[name] = min(options[name], 50)
    shape = chance.choice(((3, 2), (0, 2), (2, 3, 2), (4,), (1, 1)))
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x0 = x0.to(chance.choice((torch.float32, torch.float64, torch.bfloat16)))
    if chance.random() < 0.2:
        x0 = changed(x0, chance)
    before = copies({"x0": x0})
    try:
        sampler = cf.LangevinSampler(chance.choice(ENERGIES), **options)
        out = sampler(x0, key=cf.Key(chance.randrange(9)))
    except REFUSALS:
        assert_unchanged({"x0": x0}, before)
        return
    assert_unchanged({"x0": x0}, before)
    assert out.x.shape == x0.shape
    assert out.x.dtype == x0.dtype


def one_call(chance: random.Random) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (call_of_an_op if chance.random() < 0.9 else call_of_a_sampler)(chance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for i in range(args.calls):
        try:
            one_call(random.Random(f"{args.seed}-{i}"))
        except Exception as error:
            raise RuntimeError(f"call {i} of seed {args.seed}") from error
    print(f"{args.calls} calls of seed {args.seed}: right")


if __name__ == "__main__":
    main()
