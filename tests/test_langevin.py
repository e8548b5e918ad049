"""The Langevin ops: every option against the oracle, exact laws, derivatives, bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import coopflow_ext as cf

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = [(0, 3), (3, 0), (1, 1), (2, 3), (3, 4), (5, 5), (7,), (4, 127), (1, 65537), (3, 2, 5, 7)]
KEY = cf.Key(0xDEADBEEF12345678, time=3)

OPTIONS: dict[str, dict[str, Any]] = {
    "drift": {},
    "noise": {"noise": 0.3},
    "score": {"is_score": True, "noise": 0.3},
    "clips": {"noise": 0.3, "grad_clip": 0.7, "step_clip": 0.05},
    "clamp": {"noise": 0.3, "clamp": (-0.5, 0.8)},
    "one-sided clamp": {"noise": 0.3, "clamp": (-math.inf, 0.1)},
    "norm clip": {"noise": 0.1, "grad_norm": 0.9},
    "both clips": {"grad_norm": 0.9, "grad_clip": 0.4, "step_clip": 0.02},
    "decay": {"decay": 0.2, "noise": 0.1},
    "pull": {"pull": 0.3, "x_ref": True, "noise": 0.1},
    "noise after": {"noise": 0.3, "noise_when": 1, "clamp": (-0.5, 0.5)},
    "no noise yet": {"noise": 0.3, "noise_when": 2, "clamp": (-0.5, 0.5)},
    "given noise": {"noise": 0.3, "xi": True},
    "far chain": {"noise": 0.3, "chain": 2**40 + 1, "step": 2**31},
    "everything": {
        "noise": 0.2,
        "decay": 0.1,
        "pull": 0.2,
        "x_ref": True,
        "is_score": True,
        "grad_clip": 1.1,
        "grad_norm": 2.0,
        "step_clip": 0.1,
        "clamp": (-1.0, 1.0),
        "noise_when": 1,
        "step": 4,
        "chain": 9,
    },
}


def random_like(shape: tuple[int, ...], dtype: torch.dtype, device: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, device: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """x, grad, rng (at the option "chain") and the options with their tensors."""
    x, grad = (random_like(shape, dtype, device, seed) for seed in (0, 1))
    options = {"drift": 0.1, **options}
    key = KEY.at_chain(options.pop("chain", 0))
    for seed, name in enumerate(("x_ref", "xi"), start=2):
        if options.get(name):
            options[name] = random_like(shape, dtype, device, seed)
    return x, grad, key.tensor(device), options


def assert_matches(ours: Tensor, expected: Tensor) -> None:
    """To the rounding of the dtype; the noise's own bound on top of it."""
    ulp = torch.finfo(ours.dtype).eps
    noise = 0.0 if ours.dtype == torch.float64 else 3e-6
    torch.testing.assert_close(ours, expected, rtol=4 * ulp, atol=4 * ulp + noise)


# --- against the oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option_matches_the_oracle(
    device: torch.device, dtype: torch.dtype, name: str
) -> None:
    for shape in ((5, 13), (3, 1024)):
        x, grad, rng, options = arguments(shape, dtype, device, OPTIONS[name])
        expected = cf.reference.langevin_step(x, grad, rng, **options)
        out = cf.ops.langevin_step(x, grad, rng, **options)
        assert_matches(out, expected)
        in_place = cf.ops.langevin_step_(x, grad, rng, **options)
        assert in_place is x
        assert torch.equal(x, out)


def in_rows(row: Tensor, step: int) -> Tensor:
    """The tensor as the row of a step among others, each laid out like it, that are not numbers."""
    rows = torch.full((step + 2, *row.shape), math.nan, dtype=row.dtype, device=row.device)
    rows[step] = row
    return rows


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "far chain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_step_is_the_same_step(
    device: torch.device, dtype: torch.dtype, name: str
) -> None:
    x, grad, rng, options = arguments((5, 13), dtype, device, OPTIONS[name])
    step = options.pop("step", 3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grads = grad.clone()
    grads[3, 7] = math.nan

    def outputs() -> dict[str, Tensor]:
        return {
            "stats": torch.empty(5, 5, dtype=wide, device=device),
            "x_low": torch.empty_like(x, dtype=torch.bfloat16),
            "active": torch.tensor([True, False, True, True, True], device=device),
            "frozen_at": torch.full((5,), 99, device=device),
        }

    for gradient, written in ((grad, {}), (grads, outputs())):
        expected, ours = x.clone(), x.clone()
        bound = {**options, **{n: t.clone() for n, t in written.items()}}
        if written:
            options["freeze_nonfinite"] = bound["freeze_nonfinite"] = True
            bound["stats"] = in_rows(written["stats"], step)
        if bound.get("xi") is not None:
            bound["xi"] = in_rows(bound["xi"], step)
        cf.ops.langevin_step_(expected, gradient, rng, **options, **written, step=step)
        cf.ops.BoundStep(**bound).in_place(ours, rng)(gradient, step)
        assert torch.equal(ours, expected)
        if written:
            assert written["active"].tolist() == [True, False, True, False, True]
            assert bound["frozen_at"].tolist() == [99, 99, 99, step, 99]
            torch.testing.assert_close(bound["stats"][step], written["stats"], equal_nan=True)
            assert bound["stats"][[step - 1, step + 1]].isnan().all()
            for name in ("active", "frozen_at"):
                assert torch.equal(bound[name], written[name])
            torch.testing.assert_close(
                bound["x_low"], written["x_low"], rtol=0, atol=0, equal_nan=True
            )


def test_a_bound_step_takes_the_normals_of_its_own_step(device: torch.device) -> None:
    x, grad, rng, _ = arguments((5, 13), torch.float32, device, {})
    xi = random_like((4, 5, 13), torch.float32, device, 3)
    bound = cf.ops.BoundStep(drift=0.1, noise=0.2, xi=xi)
    for step, noise_when in ((0, 0), (3, 0), (0, 1), (2, 1)):
        ours = x.clone()
        bound.in_place(ours, rng, noise_when=noise_when)(grad, step)
        own = xi[step + noise_when]
        options = {"drift": 0.1, "noise": 0.2, "noise_when": noise_when, "step": step}
        assert torch.equal(ours, cf.ops.langevin_step(x, grad, rng, **options, xi=own))
        assert bound.at(step, noise_when=noise_when)["xi"].equal(own)
        other = bound.functional(x, grad, rng, step, noise_when=noise_when)
        assert torch.equal(other, ours)


def test_who_watches_a_bound_step_is_shown_all_of_it(device: torch.device) -> None:
    """By a dispatch mode, with tensors that have no memory, and as a graph of torch.compile."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def step(x: Tensor, grad: Tensor, rng: Tensor, x_ref: Tensor) -> Tensor:
        bound = cf.ops.BoundStep(drift=0.1, pull=0.2, x_ref=x_ref)
        bound.in_place(x, rng)(grad, 2)
        return x

    x, grad, rng, _ = arguments((5, 13), torch.float32, device, {})
    given = (grad, rng, torch.ones_like(x))
    expected = step(x.clone(), *given)
    assert not torch.equal(expected, x)
    with Watch():
        assert torch.equal(step(x.clone(), *given), expected)
    assert "coopflow.langevin_step_.default" in seen
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x.clone(), *given), expected)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, *given)]
        assert step(*fakes).shape == x.shape


def test_statistics_of_chains_without_elements_are_zero(device: torch.device) -> None:
    x, rng = torch.zeros(3, 0, device=device), KEY.tensor(device)
    stats = torch.full((2, 3, 5), math.nan, device=device)
    cf.ops.BoundStep(drift=0.1, stats=stats).in_place(x, rng)(x.clone(), 1)
    assert (stats[1] == 0).all()
    assert stats[0].isnan().all()


@pytest.mark.parametrize("shape", [(5, 3), (5, 130), (2, 700), (1, 20_000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_state_may_be_its_gradient_centre_or_noise(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Each element is read before it is written, also for the statistics."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, options in {
        "grad": {"grad_norm": 0.9, "clamp": (-0.5, 0.8), "grad_clip": 0.7},
        "x_ref": {"pull": 0.3, "noise_when": 1},
        "xi": {"noise_when": 1},
    }.items():
        for kept in ({}, {"stats": torch.empty(shape[0], 5, dtype=wide, device=device)}):
            x, grad, rng, given = arguments(shape, dtype, device, {"noise": 0.3, **options})
            apart = {"grad": grad, **given, name: x.clone()}
            shared = {"grad": grad, **given, name: x}
            expected = {n: t.clone() for n, t in kept.items()}
            moved = cf.ops.langevin_step_(x.clone(), apart.pop("grad"), rng, **apart, **expected)
            cf.ops.langevin_step_(x, shared.pop("grad"), rng, **shared, **kept)
            assert torch.equal(x, moved)
            assert all(torch.equal(kept[n], expected[n]) for n in kept)


def longdouble_norm_clip(grad: Tensor, limit: float) -> Tensor:
    """The clipped gradient, whose norm does not overflow there."""
    rows = grad.cpu().double().numpy().astype(np.longdouble)
    norm = np.sqrt((rows * rows).sum(1))
    scale = np.minimum(np.longdouble(1), np.longdouble(limit) / np.where(norm > 0, norm, 1))
    return torch.from_numpy((rows * scale[:, None]).astype(np.float64))


@pytest.mark.parametrize(
    "size", [1e-300, 1e-160, 1e-37, 1e-20, 1.0, 1e19, 1e30, 3e38, 1e160, 1e300]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_clip_holds_for_every_finite_gradient(
    device: torch.device, dtype: torch.dtype, size: float
) -> None:
    """Where squares overflow or vanish, in every kernel that the length of a chain asks for."""
    wide = dtype == torch.float64
    if not wide and not 1e-37 <= size <= 3e38:
        return
    for d in (1, 3, 40, 700, 20_000):
        grad = random_like((3, d), torch.float64, device, 4).clamp(-1, 1)
        grad[2, : d // 2] *= 1e-3  # and elements whose squares are far apart
        grad = (grad * size).to(dtype)
        for limit in (0.37 * size, 1.0, 1e3 * size):
            if limit / size < (1e-300 if wide else 1e-38):
                continue  # the scale itself would not be a normal number
            options = {"drift": 1.0, "grad_norm": limit}
            expected = longdouble_norm_clip(grad, limit)
            rng, x = KEY.tensor(device), torch.zeros_like(grad)
            kind = torch.finfo(dtype)
            tolerance = {"rtol": 16 * kind.eps, "atol": kind.smallest_normal * kind.eps}
            ours = -cf.ops.langevin_step_(x, grad, rng, **options)
            if wide and d == 40 and size == 1.0:
                assert (expected.norm(dim=1) <= limit * (1 + 1e-15)).all()
            torch.testing.assert_close(ours.cpu().double(), expected, **tolerance)
            reference = -cf.reference.langevin_step(torch.zeros_like(grad), grad, rng, **options)
            torch.testing.assert_close(reference.cpu().double(), expected, **tolerance)


def test_the_norm_clip_of_elements_of_every_size(device: torch.device) -> None:
    rows = [[1e-200, 1e200], [3e-170, 4e-170], [1e150, 1e-150], [1e-160, 1e-100], [0.0, 5e-324]]
    grad = torch.tensor(rows, dtype=torch.float64, device=device)
    for limit in (1e-180, 1e-165, 1e-90, 1.0, 1e160):
        x = torch.zeros_like(grad)
        ours = -cf.ops.langevin_step_(x, grad, KEY.tensor(device), drift=1.0, grad_norm=limit)
        expected = longdouble_norm_clip(grad, limit)
        normal = limit / grad.cpu().abs().amax(1) > 1e-300  # where the scale is
        assert normal.any()
        torch.testing.assert_close(ours.cpu()[normal], expected[normal], rtol=4e-15, atol=5e-324)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_sizes(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for name in ("clamp", "everything", "given noise", "norm clip"):
        x, grad, rng, options = arguments(shape, dtype, device, OPTIONS[name])
        expected = cf.reference.langevin_step(x, grad, rng, **options)
        assert_matches(cf.ops.langevin_step_(x, grad, rng, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_views(device: torch.device, dtype: torch.dtype) -> None:
    _, _, rng, options = arguments((1,), dtype, device, OPTIONS["clamp"])
    storages = [random_like((4 * 256 + 1,), dtype, device, seed) for seed in (0, 1)]
    x, grad = (storage[1:].view(4, 256) for storage in storages)
    aligned = cf.ops.langevin_step(x.clone(), grad.clone(), rng, **options)
    before = storages[0][0].clone()
    assert torch.equal(cf.ops.langevin_step_(x, grad, rng, **options), aligned)
    assert torch.equal(storages[0][0], before), "the element before the view was written"


def test_channels_last_moves_in_storage_order(device: torch.device) -> None:
    x, grad, rng, options = arguments((3, 4, 5, 6), torch.float32, device, OPTIONS["everything"])
    last = [t.to(memory_format=torch.channels_last) for t in (x, grad)]
    options["x_ref"] = options["x_ref"].to(memory_format=torch.channels_last)
    out = cf.ops.langevin_step(*last, rng, **options)
    assert out.is_contiguous(memory_format=torch.channels_last)
    options["x_ref"] = options["x_ref"].permute(0, 2, 3, 1).contiguous()
    rows = [t.permute(0, 2, 3, 1).contiguous() for t in last]
    assert torch.equal(out.permute(0, 2, 3, 1), cf.ops.langevin_step(*rows, rng, **options))


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (1, 5), (6, 5)])
@pytest.mark.parametrize("noise_when", [0, 1])
def test_coefficient_tables(
    device: torch.device, shape: tuple[int, int], table_dtype: torch.dtype, noise_when: int
) -> None:
    x, grad, rng, options = arguments((5, 13), torch.float32, device, {"x_ref": True})
    generator = torch.Generator().manual_seed(9)
    for name in ("drift", "noise", "decay", "pull"):
        table = torch.rand(shape, generator=generator, dtype=table_dtype)
        options[name] = table.to(device)
    options |= {"step": 4, "noise_when": noise_when}
    expected = cf.reference.langevin_step(x, grad, rng, **options)
    assert_matches(cf.ops.langevin_step(x, grad, rng, **options), expected)
    # A strided table is read through its strides.
    options["drift"] = torch.stack([options["drift"]] * 2, dim=-1)[..., 0]
    assert_matches(cf.ops.langevin_step(x, grad, rng, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_alone(device: torch.device, dtype: torch.dtype) -> None:
    x, _, rng, _ = arguments((5, 13), dtype, device, {})
    xi = random_like((5, 13), dtype, device, 7)
    for options in (
        {"noise": 0.4},
        {"noise": 0.4, "step": 3},
        {"noise": torch.rand(4, 5, device=device), "step": 2},
        {"noise": 0.4, "xi": xi},
        {"noise": 0.0},
    ):
        expected = cf.reference.langevin_noise(x, rng, **options)
        y = x.clone()
        assert cf.ops.langevin_noise_(y, rng, **options) is y
        assert_matches(y, expected)
    active = torch.tensor([True, False, True, False, True], device=device)
    y = cf.ops.langevin_noise_(x.clone(), rng, noise=0.4, active=active)
    assert torch.equal(y[~active], x[~active])
    assert not torch.equal(y[active], x[active])


def test_noise_alone_ignores_nothing_but_adds_noise(device: torch.device) -> None:
    """A non-finite state stays what it is: there is no gradient to multiply by zero."""
    x = torch.tensor([[math.inf, -math.inf, 1.0]], device=device)
    cf.ops.langevin_noise_(x, KEY.tensor(device), noise=0.1)
    assert x[0, 0] == math.inf
    assert x[0, 1] == -math.inf


# --- further outputs ------------------------------------------------------------------------------


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 13), (3, 1), (2, 5000), (2, 40000), (4, 0)])
@pytest.mark.parametrize("noise_when", [0, 1, 2])
def test_statistics(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], noise_when: int
) -> None:
    options: dict[str, Any] = {
        "noise": 0.3,
        "grad_clip": 1.2,
        "step_clip": 0.1,
        "decay": 0.05,
        "clamp": (-1.0, 0.9),
        "noise_when": noise_when,
    }
    x, grad, rng, options = arguments(shape, dtype, device, options)
    stats = torch.full((shape[0], 5), -7.0, dtype=statistics_dtype(dtype), device=device)
    before = x.clone()
    plain = cf.ops.langevin_step(x, grad, rng, **options)
    cf.ops.langevin_step_(x, grad, rng, stats=stats, **options)
    assert torch.equal(x, plain), "statistics change the path"
    when = 2 if noise_when == 1 else noise_when  # what comes after the clamp does not count
    wide = statistics_dtype(dtype)
    settled = cf.ops.langevin_step(before, grad, rng, **{**options, "noise_when": when})
    unclamped = cf.ops.langevin_step(
        before.to(wide), grad.to(wide), rng, **{**options, "noise_when": when, "clamp": None}
    )

    def expected(scale: float) -> Tensor:
        """With every limit scaled: an element within rounding of a limit may count or not."""
        return cf.reference.langevin_statistics(
            before,
            grad,
            settled,
            drift=options["drift"],
            decay=options["decay"],
            grad_clip=options["grad_clip"] * scale,
            step_clip=options["step_clip"] * scale,
            clamp=(options["clamp"][0] * scale, options["clamp"][1] * scale),
            x_unclamped=unclamped,
        )

    torch.testing.assert_close(stats[:, :2], expected(1)[:, :2], rtol=2e-5, atol=1e-6)
    assert (stats[:, 2:4] >= expected(1 + 1e-5)[:, 2:4]).all()
    assert (stats[:, 2:4] <= expected(1 - 1e-5)[:, 2:4]).all()
    assert torch.equal(stats[:, 4], expected(1)[:, 4])
    if shape[1] > 100:
        assert (stats[:, 2:4] > 0).all()


def test_statistics_do_not_depend_on_threads_or_batch() -> None:
    x, grad, rng, options = arguments((9, 50000), torch.float32, "cpu", OPTIONS["clamp"])
    threads = torch.get_num_threads()
    rows = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            stats = torch.empty(9, 5)
            cf.ops.langevin_step_(x.clone(), grad, rng, stats=stats, **options)
            rows.append(stats)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(rows[0], rows[1])
    one = torch.empty(1, 5)
    rng[2] += 4
    cf.ops.langevin_step_(x[4:5].clone(), grad[4:5], rng, stats=one, **options)
    assert torch.equal(one[0], rows[0][4])


def test_nonfinite_elements_are_counted(device: torch.device) -> None:
    x, grad, rng, _ = arguments((3, 40), torch.float32, device, {})
    grad[1, 3], grad[1, 5], grad[2, 0] = math.nan, math.inf, -math.inf
    stats = torch.empty(3, 5, device=device)
    cf.ops.langevin_step_(x, grad, rng, drift=0.1, stats=stats)
    assert stats[:, 4].tolist() == [0, 2, 1]


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 13), (2, 1024)])
def test_low_precision_copy(
    device: torch.device, dtype: torch.dtype, low: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, grad, rng, options = arguments(shape, dtype, device, OPTIONS["clamp"])
    copy = torch.full(shape, -9.0, dtype=low, device=device)
    cf.ops.langevin_step_(x, grad, rng, x_low=copy, **options)
    assert torch.equal(copy, x.float().to(low))


@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inactive_chains_stay(device: torch.device, dtype: torch.dtype, with_stats: bool) -> None:
    x, grad, rng, options = arguments((6, 33), dtype, device, OPTIONS["everything"])
    active = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool, device=device)
    stats = torch.empty(6, 5, dtype=statistics_dtype(dtype), device=device)
    moved = cf.ops.langevin_step(x, grad, rng, **options)
    y = x.clone()
    cf.ops.langevin_step_(
        y, grad, rng, active=active, stats=stats if with_stats else None, **options
    )
    assert torch.equal(y[~active], x[~active])
    assert torch.equal(y[active], moved[active])
    if with_stats:
        assert (stats[~active, 1:4] == 0).all()
        assert (stats[:, 0] > 0).all()


@pytest.mark.parametrize("with_stats", [False, True])
def test_freezing_clears_the_mask_before_anything_is_written(
    device: torch.device, with_stats: bool
) -> None:
    x, grad, rng, options = arguments((4, 40000), torch.float32, device, OPTIONS["clamp"])
    grad[1, 39999] = math.nan
    grad[3, 0] = math.inf
    active = torch.tensor([True, True, False, True], device=device)
    frozen_at = torch.full((4,), 9, device=device)
    stats = torch.empty(4, 5, device=device) if with_stats else None
    y = x.clone()
    cf.ops.langevin_step_(
        y, grad, rng, step=5, active=active, freeze_nonfinite=True, frozen_at=frozen_at,
        stats=stats, **options,
    )  # fmt: skip
    assert active.tolist() == [True, False, False, False]
    assert frozen_at.tolist() == [9, 5, 9, 5]
    assert torch.equal(y[1:], x[1:])
    assert torch.equal(y[0], cf.ops.langevin_step(x, grad, rng, step=5, **options)[0])
    if stats is not None:
        assert stats[:, 4].tolist() == [0, 1, 0, 1]
    cf.ops.langevin_step_(
        y, grad, rng, step=6, active=active, freeze_nonfinite=True, frozen_at=frozen_at, **options
    )
    assert frozen_at.tolist() == [9, 5, 9, 5]  # the first such step stays


def test_nan_gradient_reaches_the_state_unless_frozen(device: torch.device) -> None:
    """Clips and clamp hide no NaN."""
    x, grad, rng, options = arguments((2, 8), torch.float32, device, OPTIONS["everything"])
    grad[1, 2] = math.nan
    out = cf.ops.langevin_step(x, grad, rng, **options)
    assert out[1].isnan().any()
    assert out[0].isfinite().all()


# --- exact laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_law_1_gaussian_target(device: torch.device, dtype: torch.dtype) -> None:
    """U = λx²/2: mean and variance after T steps and at rest are known in closed form."""
    chains, curvature, delta, m0 = 200_000, 1.7, 0.9, 2.0
    a = 1 - delta**2 * curvature / 2
    x = torch.full((chains, 1), m0, dtype=dtype, device=device)
    rng = cf.Key(5).tensor(device)
    for step in range(40):
        cf.ops.langevin_step_(x, curvature * x, rng, drift=delta**2 / 2, noise=delta, step=step)
        if step + 1 in (1, 2, 5, 40):
            mean = a ** (step + 1) * m0
            variance = delta**2 * (1 - a ** (2 * step + 2)) / (1 - a**2)
            assert abs(x.mean().item() - mean) < 5 * math.sqrt(variance / chains)
            assert abs(x.var().item() / variance - 1) < 5 * math.sqrt(2 / chains)
    at_rest = 1 / (curvature * (1 - delta**2 * curvature / 4))
    assert abs(x.var().item() / at_rest - 1) < 5 * math.sqrt(2 / chains)


def test_law_2_without_noise_the_energy_falls(device: torch.device) -> None:
    """δ²/2 < 1/L for U = Σ log cosh(x_i) + |x|²/4, whose L is 3/2."""
    x = random_like((64, 10), torch.float64, device, 3) * 4
    rng = KEY.tensor(device)

    def energy(x: Tensor) -> Tensor:
        return (x.cosh().log() + x.square() / 4).sum(1)

    last = energy(x)
    for step in range(50):
        cf.ops.langevin_step_(x, x.tanh() + x / 2, rng, drift=0.66, step=step)
        now = energy(x)
        assert (now <= last + 1e-12).all()
        last = now


# --- derivatives ----------------------------------------------------------------------------------

DIFFERENTIABLE = {
    name: {k: v for k, v in options.items() if k not in ("step", "chain")}
    for name, options in OPTIONS.items()
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_first_and_second_order(device: torch.device, name: str) -> None:
    x, grad, rng, options = arguments((3, 4), torch.float64, device, DIFFERENTIABLE[name])
    if options.get("noise"):
        options["noise"] = torch.rand(2, 3, device=device)
        options["step"] = 0
    x.requires_grad_()
    grad.requires_grad_()

    def step(x: Tensor, grad: Tensor) -> Tensor:
        return cf.ops.langevin_step(x, grad, rng, **options)

    assert torch.autograd.gradcheck(step, (x, grad))
    assert torch.autograd.gradgradcheck(step, (x, grad))


def test_the_norm_clip_is_differentiable_at_zero_norm(device: torch.device) -> None:
    """Where it changes nothing: the gradients are those without it, twice."""
    x, grad, rng, _ = arguments((3, 4), torch.float64, device, {})
    grad[1] = 0.0
    x.requires_grad_()
    grad.requires_grad_()

    def derivatives(grad_norm: float | None) -> tuple[Tensor, ...]:
        out = cf.ops.langevin_step(x, grad, rng, drift=grad.new_tensor([[0.3]]).detach(),
                                   grad_norm=grad_norm)  # fmt: skip
        first = torch.autograd.grad(out.square().sum(), (x, grad), create_graph=True)
        second = torch.autograd.grad(sum(f.square().sum() for f in first), (x, grad))
        return (*first, *second)

    for clipped, plain in zip(derivatives(0.1), derivatives(None), strict=True):
        assert clipped.isfinite().all()
        torch.testing.assert_close(clipped[1], plain[1])


@pytest.mark.parametrize("which", ["x", "grad"])
def test_in_place_refuses_what_needs_a_derivative(device: torch.device, which: str) -> None:
    x, grad, rng, options = arguments((2, 3), torch.float32, device, {})
    {"x": x, "grad": grad}[which].requires_grad_()
    before = x.detach().clone()
    with pytest.raises(ValueError, match=f"{which} requires grad"):
        cf.ops.langevin_step_(x, grad, rng, **options)
    assert torch.equal(x.detach(), before)
    with torch.no_grad():
        cf.ops.langevin_step_(x, grad, rng, **options)
    assert not torch.equal(x.detach(), before)


def test_noise_in_place_refuses_what_needs_a_derivative(device: torch.device) -> None:
    x = torch.zeros(2, 3, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="langevin_noise_: x requires grad"):
        cf.ops.langevin_noise_(x, KEY.tensor(device), noise=0.1)


@pytest.mark.parametrize("op", ["step", "noise"])
def test_autograd_notices_the_mutation(device: torch.device, op: str) -> None:
    x, grad, rng, _ = arguments((2, 3), torch.float32, device, {})
    weight = torch.ones(2, 3, device=device, requires_grad=True)
    loss = (weight * x).sum()
    if op == "step":
        cf.ops.langevin_step_(x, grad, rng, drift=0.1)
    else:
        cf.ops.langevin_noise_(x, rng, noise=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("noise_when", [0, 1, 2])
@pytest.mark.parametrize(
    "more", [{}, {"clamp": (-0.6, 0.7), "grad_norm": 0.8}, {"step_clip": 0.2, "is_score": True}]
)
@pytest.mark.parametrize("supplied", [False, True])
def test_derivatives_by_coefficients(noise_when: int, more: dict, supplied: bool) -> None:
    """First and second, of a row for each step and of one for all, against finite differences."""
    torch.manual_seed(0)
    x, grad, x_ref, xi = torch.randn(4, 3, 2, dtype=torch.float64)
    rng, step = KEY.tensor(), 1

    def moved(x: Tensor, grad: Tensor, *tables: Tensor) -> Tensor:
        names = ("drift", "noise", "decay", "pull")
        return cf.ops.langevin_step(
            x, grad, rng, **dict(zip(names, tables, strict=True)), x_ref=x_ref, step=step,
            noise_when=noise_when, xi=xi if supplied else None, **more,
        )  # fmt: skip

    tables = [torch.rand(shape, dtype=torch.float64) for shape in ((3, 3), (3, 1), (1, 3), (1, 1))]
    inputs = [t.requires_grad_() for t in (x, grad, *tables)]
    assert torch.autograd.gradcheck(moved, inputs)
    assert torch.autograd.gradgradcheck(moved, inputs)


@pytest.mark.parametrize("name", ["x_ref", "xi"])
def test_constants_that_require_grad_are_refused(device: torch.device, name: str) -> None:
    x, grad, rng, options = arguments(
        (2, 3), torch.float32, device, {"x_ref": True, "xi": True, "noise": 0.1}
    )
    options[name] = options[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} is a constant"):
        cf.ops.langevin_step(x, grad, rng, **options)


# --- torch.compile --------------------------------------------------------------------------------


def test_compiled_in_place_step_equals_eager(device: torch.device) -> None:
    x, grad, rng, options = arguments((5, 13), torch.float32, device, OPTIONS["clamp"])

    def two_steps(x: Tensor) -> Tensor:
        cf.ops.langevin_step_(x, grad, rng, **options)
        cf.ops.langevin_step_(x, grad, rng, step=1, **options)
        return x * 2

    expected = two_steps(x.clone())
    assert torch.equal(torch.compile(two_steps, fullgraph=True)(x.clone()), expected)


def test_equal_draws_are_not_merged_and_the_key_is_read_each_time(device: torch.device) -> None:
    def draw(rng: Tensor) -> Tensor:
        x = torch.zeros(4, 8, device=rng.device)
        cf.ops.langevin_noise_(x, rng, noise=1.0)
        y = torch.zeros(4, 8, device=rng.device)
        cf.ops.langevin_noise_(y, rng, noise=1.0, step=1)
        return torch.stack((x, y))

    compiled = torch.compile(draw, fullgraph=True)
    rng = KEY.tensor(device)
    first = compiled(rng)
    assert torch.equal(first, draw(rng))
    assert not torch.equal(first[0], first[1])
    rng[1] += 1
    assert torch.equal(compiled(rng)[0], first[1])


# --- streams, sizes and properties ----------------------------------------------------------------


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_on_a_device_that_is_not_current() -> None:
    x, grad, rng, options = arguments((64, 4096), torch.float32, "cuda", OPTIONS["everything"])
    expected = cf.ops.langevin_step(x, grad, rng, **options)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs on another stream would be early
        late = x + 0
        out = cf.ops.langevin_step(late, grad, rng, **options)
    stream.synchronize()
    assert torch.equal(out, expected)
    if torch.cuda.device_count() > 1:
        moved = [t.to("cuda:1") for t in (x, grad, rng)]
        other = {k: v.to("cuda:1") if isinstance(v, Tensor) else v for k, v in options.items()}
        assert torch.equal(cf.ops.langevin_step(*moved, **other).to(x.device), expected)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """B·D beyond 2³¹ (15 GiB): the last chain moves as it does alone."""
    shape = (3, 2**30)
    x = torch.zeros(shape, dtype=torch.bfloat16)
    grad = torch.full(shape, 0.5, dtype=torch.bfloat16)
    rng = KEY.tensor()
    cf.ops.langevin_step_(x, grad, rng, drift=0.1, noise=0.2)
    tail = slice(2**30 - 4096, 2**30)
    z = torch.empty(1, 2**30, dtype=torch.bfloat16)
    torch.ops.coopflow.normal_(z, KEY.at_chain(2).tensor())
    expected = (-0.05 + 0.2 * z[0, tail].float()).bfloat16().float()
    torch.testing.assert_close(x[2, tail].float(), expected, rtol=2e-2, atol=2e-3)
    assert (x[2, tail] != 0).all()


@given(
    batch=st.integers(1, 9),
    per_chain=st.integers(1, 700),
    drift=st.floats(-1, 1),
    noise=st.floats(0, 1),
    step=st.integers(0, 2**32 - 4),
    chain=st.integers(0, 2**63 - 10),
)
def test_any_shape_and_counter_matches_the_oracle(
    batch: int, per_chain: int, drift: float, noise: float, step: int, chain: int
) -> None:
    rng = cf.Key(1, chain=chain).tensor()
    x, grad = (random_like((batch, per_chain), torch.float64, "cpu", seed) for seed in (0, 1))
    options = {"drift": drift, "noise": noise, "step": step}
    out = cf.ops.langevin_step(x, grad, rng, **options)
    expected = cf.reference.langevin_step(x, grad, rng, **options)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


def test_a_gradient_compiled_for_any_sizes_takes_every_layout() -> None:
    """Its norm is over a chain's elements, whose number a graph must not mistake."""
    rng = cf.Key(0).tensor()

    def loss(x: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(x)
        return cf.ops.langevin_step(x, ones, rng, drift=0.1, noise=0.2, grad_norm=1.0).sum()

    compiled = torch.compile(loss, dynamic=True, backend="eager", fullgraph=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 3, 5).contiguous(memory_format=layout).requires_grad_()
        found, expected = (torch.autograd.grad(call(x), x)[0] for call in (compiled, loss))
        torch.testing.assert_close(found, expected)
