"""MALA: the stationary distribution is the target's, whatever the step size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext.energies import MLPEnergy
from coopflow_ext.samplers import MALASampler


def double_well(x: Tensor) -> Tensor:
    """One-dimensional, skewed, far from Gaussian."""
    return (1.5 * (x.square() - 1).square() + 0.4 * x).sum(1)


def bin_probabilities(edges: np.ndarray, tau: float) -> np.ndarray:
    """Of exp(−U/τ), by the trapezoid rule."""
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    density = torch.exp(-double_well(grid[:, None]) / tau).numpy()
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    cumulative /= cumulative[-1]
    return np.diff(np.interp(edges, grid.numpy(), cumulative))


@pytest.mark.parametrize(("delta", "tau"), [(0.3, 1.0), (0.8, 1.0), (0.6, 2.5)])
def test_histogram_equals_quadrature(delta, tau):
    """20,000 independent chains, so the counts are multinomial: chi-square at 5 sigma."""
    edges = np.array([-4, -1.3, -1.1, -0.9, -0.6, -0.2, 0.3, 0.7, 1.0, 1.3, 4])
    expected = bin_probabilities(edges, tau)
    # Inside the wells: far out, where U grows like x⁴, MALA rejects nearly every proposal.
    start = 2.4 * cf.ops.uniform((20_000, 1), cf.Key(8).tensor()) - 1.2
    sampler = MALASampler(double_well, n_steps=300, step_size=delta, temperature=tau)
    x = sampler(start, key=cf.Key(9)).x
    counts, _ = np.histogram(x.numpy(), edges)
    chi2 = ((counts - 20_000 * expected) ** 2 / (20_000 * expected)).sum()
    bins = len(expected) - 1
    assert chi2 < bins + 5 * math.sqrt(2 * bins)


def test_detailed_balance():
    """In the stationary state, moves between any two bins are as frequent in both directions."""
    edges = torch.tensor([-1.0, -0.4, 0.4, 1.0])
    n_bins = len(edges) + 1
    # Stationary starts by inverting the cumulative distribution function.
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    cumulative = torch.exp(-double_well(grid[:, None])).cumsum(0)
    u = cf.ops.uniform((100_000,), cf.Key(4).tensor(), dtype=torch.float64)
    start = grid[torch.searchsorted(cumulative / cumulative[-1], u)][:, None]
    end = MALASampler(double_well, n_steps=1, step_size=0.8)(start, key=cf.Key(5)).x
    before, after = (torch.bucketize(x.flatten(), edges.double()) for x in (start, end))
    flow = torch.zeros(n_bins * n_bins).index_add_(
        0, before * n_bins + after, torch.ones(len(start))
    )
    flow = flow.reshape(n_bins, n_bins)
    difference, total = flow - flow.T, flow + flow.T
    assert (difference.abs() <= 5 * total.sqrt()).all()
    assert (total[0, 1:3] > 100).all()


def test_acceptance_ratio_is_exact_for_a_gaussian():
    """log of p(y) q(x|y) / (p(x) q(y|x)) from the normal densities themselves, U = λx²/2."""
    lam, delta = 1.7, 0.9
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    xi = cf.ops.normal((1, 9, 1), cf.Key(2).tensor(), dtype=torch.float64)
    out = MALASampler(
        lambda x: 0.5 * lam * x.square().sum(1), n_steps=1, step_size=delta, stats=True
    )(x0, key=cf.Key(0), xi=xi)
    y = x0 - 0.5 * delta**2 * lam * x0 + delta * xi[0]

    def log_normal(z, mean):
        return -(((z - mean) / delta) ** 2) / 2

    def mean(z):
        return z - 0.5 * delta**2 * lam * z

    log_ratio = (
        0.5 * lam * (x0**2 - y**2) + log_normal(x0, mean(y)) - log_normal(y, mean(x0))
    ).flatten()
    torch.testing.assert_close(out.stats.acceptance[0], log_ratio.exp().clamp(max=1))
    assert out.stats.accepted.any()
    assert not out.stats.accepted.all()
    torch.testing.assert_close(out.x, torch.where(out.stats.accepted[0][:, None], y, x0))


def test_statistics_are_those_of_the_states_after_the_steps():
    x0 = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    sizes = torch.linspace(0.2, 0.9, 5, dtype=torch.float64)
    out = MALASampler(
        lambda x: -double_well(x), n_steps=5, step_size=sizes, negative_energy=True, stats=True,
        return_trajectory=True,
    )(x0, key=cf.Key(1))  # fmt: skip
    states = torch.cat([x0[None], out.trajectory])
    points = states[1:].clone().requires_grad_()
    u = torch.stack([double_well(x) for x in points])
    (slopes,) = torch.autograd.grad(u.sum(), points)
    torch.testing.assert_close(out.stats.energy, u.detach())
    torch.testing.assert_close(out.stats.grad_norm, slopes.abs()[..., 0])
    moved = (states[1:] != states[:-1])[..., 0]
    assert torch.equal(out.stats.accepted, moved)
    assert moved.any()
    assert not moved.all()
    assert torch.equal(out.stats.step_size, sizes[:, None].expand(5, 8))


def test_values_per_chain_must_fit_the_batch():
    sampler = MALASampler(double_well, n_steps=2, step_size=torch.full((1, 5), 0.1))
    with pytest.raises(ValueError, match="step_size has values for 5 chains, but x0 has 4"):
        sampler(torch.zeros(4, 1))


def test_step_size_adapts_to_the_target_acceptance():
    dim, target = 20, 0.574
    scales = torch.linspace(0.3, 1.0, dim)
    x0 = scales * cf.ops.normal((200, dim), cf.Key(1).tensor())
    energy = lambda x: 0.5 * (x / scales).square().sum(1)  # noqa: E731
    for start in (0.02, 3.0):
        out = MALASampler(
            energy, n_steps=600, step_size=start, adapt_steps=400, target_accept=target, stats=True
        )(x0, key=cf.Key(2))
        assert out.stats.acceptance[400:].mean().item() == pytest.approx(target, abs=0.05)
        assert torch.equal(out.stats.step_size[400:], out.step_size.expand(200, 200))


def test_chains_do_not_depend_on_their_neighbours():
    energy, key = double_well, cf.Key(3)
    x0 = torch.linspace(-1, 1, 64)[:, None]
    sampler = MALASampler(energy, n_steps=30, step_size=0.5, adapt_steps=20, return_trajectory=True)
    whole = sampler(x0, key=key)
    one = sampler(x0[17:18], key=key.at_chain(17))
    assert torch.equal(one.trajectory[:, 0], whole.trajectory[:, 17])
    assert torch.equal(one.step_size[0], whole.step_size[17])


def test_continues_from_the_key():
    x0 = torch.linspace(-1, 1, 8)[:, None]
    long = MALASampler(double_well, n_steps=20, step_size=0.5)(x0, key=cf.Key(0))
    half = MALASampler(double_well, n_steps=10, step_size=0.5)
    first = half(x0, key=cf.Key(0))
    assert torch.equal(half(first.x, key=first.key).x, long.x)
    assert not torch.equal(first.x, x0)


def test_negative_energy_restored_parameters_and_rejected_nonfinite_proposals():
    net = MLPEnergy(2)
    x0 = torch.randn(16, 2)
    a = MALASampler(net, n_steps=5, step_size=0.5)(x0, key=cf.Key(0))
    b = MALASampler(lambda x: -net(x), n_steps=5, step_size=0.5, negative_energy=True)(
        x0, key=cf.Key(0)
    )
    torch.testing.assert_close(a.x, b.x)
    assert all(p.requires_grad for p in net.parameters())

    def walls(x):  # infinite outside the box
        u = 0.5 * x.square().sum(1)
        return torch.where((x.abs() > 1).any(1), torch.inf, u)

    inside = MALASampler(walls, n_steps=50, step_size=1.0)(0.1 * x0, key=cf.Key(1)).x
    assert (inside.abs() <= 1).all()
    with pytest.raises(cf.NonFiniteError) as caught:
        MALASampler(walls, n_steps=5, step_size=1.0)(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    assert caught.value.chains.tolist() == [1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"step_size": 0.0}, "step_size must be > 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"target_accept": 1.0}, "target_accept"),
        ({"adapt_steps": 9}, "adapt_steps"),
        ({"adapt_steps": 2, "step_size": [0.1] * 5}, "adapt_steps needs"),
        ({"thin": 0}, "thin"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        MALASampler(double_well, **{"n_steps": 5, "step_size": 0.1, **options})


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_proposals_without_an_energy_are_refused(value: float) -> None:
    """Also where it is −∞, which would be accepted for ever."""

    def energy(x: Tensor) -> Tensor:
        return torch.where(x.abs() > 0.5, value, 0.5 * x.square()).sum(1)

    sampler = MALASampler(energy, n_steps=40, step_size=0.7, stats=True, kernel=False)
    out = sampler(torch.zeros(64, 1), key=cf.Key(1))
    assert out.x.abs().max() <= 0.5
    assert out.x.unique().numel() > 32
    assert out.stats is not None
    assert (out.stats.acceptance[out.stats.accepted == 0] < 1).all()


def test_a_start_without_a_gradient_is_named() -> None:
    """Its energy is 0."""
    sampler = MALASampler(lambda x: x.abs().sqrt().sum(1), n_steps=2, step_size=0.1, kernel=False)
    with pytest.raises(cf.NonFiniteError, match="1 of 2"):
        sampler(torch.tensor([[0.0], [1.0]]), key=cf.Key(0))


class _NoSlopeFarOut(torch.autograd.Function):
    """x²/2, whose gradient is NaN beyond ½."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square() / 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.where(x.abs() > 0.5, math.nan, x)


@pytest.mark.parametrize("adapt_steps", [0, 20])
def test_proposals_whose_ratio_is_not_a_number_are_refused(adapt_steps: int) -> None:
    """They count as never accepted, in the statistics and for the step size."""
    out = MALASampler(
        lambda x: _NoSlopeFarOut.apply(x).sum(1), n_steps=40, step_size=0.7, stats=True,
        adapt_steps=adapt_steps,
    )(torch.zeros(64, 1), key=cf.Key(1))  # fmt: skip
    assert out.x.abs().max() <= 0.5
    assert out.x.unique().numel() > 32
    assert out.stats is not None
    assert out.stats.acceptance.isfinite().all()
    assert (out.stats.acceptance == 0).any()
    assert out.step_size.isfinite().all()


def test_bounds_of_the_adaptation() -> None:
    """It may last to the end, of a table of one row as of a number, and sees nothing after it."""
    common = {"n_steps": 4, "stats": True, "kernel": False}
    x0 = torch.linspace(-1, 1, 8)[:, None]
    for step_size in (0.3, [[0.3]], torch.full((1, 8), 0.3)):
        for adapt_steps in (3, 4):
            sampler = MALASampler(
                double_well, step_size=step_size, adapt_steps=adapt_steps, **common
            )
            first, again = (sampler(x0, key=cf.Key(0)) for _ in range(2))
            assert torch.equal(first.step_size, again.step_size)
            assert torch.equal(first.stats.step_size[0], torch.full((8,), 0.3))
            assert (first.step_size != 0.3).all()
    for rows in (2, 4):
        with pytest.raises(ValueError, match="adapt_steps needs a step_size that is the same"):
            MALASampler(double_well, n_steps=rows, step_size=[0.1] * rows, adapt_steps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_a_state_in_half_precision_are_in_float32(dtype: torch.dtype) -> None:
    """Moves and gradients of 300 in 100 elements, whose squares are beyond float16."""
    x0 = torch.full((2, 100), 300.0, dtype=dtype)
    out = MALASampler(
        lambda x: x.float().square().sum(1) / 2, n_steps=1, step_size=1.4, stats=True
    )(x0, key=cf.Key(0))
    assert out.stats is not None
    assert out.stats.grad_norm.dtype == torch.float32
    assert out.stats.accepted.all()
    expected = out.x.float().norm(dim=1)
    torch.testing.assert_close(out.stats.grad_norm[0], expected, rtol=1e-4, atol=0)


def test_a_network_in_autocast_runs_step_by_step() -> None:
    torch.manual_seed(0)
    net, x0 = MLPEnergy(3), torch.randn(8, 3)
    common = {"n_steps": 4, "step_size": 0.3, "autocast": torch.bfloat16, "stats": True}
    ends = [MALASampler(net, kernel=k, **common)(x0, key=cf.Key(0)) for k in ("auto", False)]
    assert torch.equal(ends[0].stats.energy, ends[1].stats.energy)
    with pytest.raises(ValueError, match="autocast is for steps one by one"):
        MALASampler(net, kernel=True, **common)
