"""BAOAB: its equations, its exact stationary law, and continuing a path."""

from __future__ import annotations

import math

import pytest
import torch

import coopflow_ext as cf
from coopflow_ext.energies import MLPEnergy
from coopflow_ext.samplers import UnderdampedLangevinSampler


def quadratic(lam):
    return lambda x: 0.5 * lam * x.square().sum(1)


@pytest.mark.parametrize(
    ("lam", "h", "gamma", "tau"), [(1.0, 1.0, 1.0, 1.0), (4.0, 0.9, 0.5, 2.0), (0.5, 2.0, 3.0, 0.3)]
)
def test_stationary_variances_law_5(lam, h, gamma, tau):
    """Position τ/λ exactly, velocity τ(1 − h²λ/4) at the end of a step."""
    n = 200_000
    sampler = UnderdampedLangevinSampler(
        quadratic(lam), n_steps=60, step_size=h, friction=gamma, temperature=tau
    )
    x0 = math.sqrt(tau / lam) * cf.ops.normal((n, 1), cf.Key(1).tensor())
    out = sampler(x0, key=cf.Key(2))
    band = 5 * math.sqrt(2 / n)
    assert out.x.var().item() == pytest.approx(tau / lam, rel=band)
    assert out.velocity.var().item() == pytest.approx(tau * (1 - h * h * lam / 4), rel=band)


def test_equals_its_equations():
    net = MLPEnergy(3).double()
    x = x0 = torch.randn(4, 3, dtype=torch.float64)
    v = v0 = torch.randn(4, 3, dtype=torch.float64)
    xi = torch.randn(6, 4, 3, dtype=torch.float64)
    tau = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    h, gamma = 0.3, 0.7

    def grad(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(net(leaf).sum(), leaf)[0]

    states, rows = [], []
    for k in range(6):
        c = math.exp(-gamma * h)
        v = v - h / 2 * grad(x)
        x = x + h / 2 * v
        v = c * v + math.sqrt(tau[k] * (1 - c * c)) * xi[k]
        x = x + h / 2 * v
        v = v - h / 2 * grad(x)
        states.append(x)
        rows.append((net(x).detach(), grad(x).norm(dim=1), v.square().sum(1) / 2))
    out = UnderdampedLangevinSampler(
        net, n_steps=6, step_size=h, friction=gamma, temperature=tau, return_trajectory=True,
        thin=2, stats=True,
    )(x0, xi=xi, velocity=v0)  # fmt: skip
    torch.testing.assert_close(out.x, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.velocity, v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.trajectory, torch.stack(states[1::2]), rtol=1e-12, atol=1e-12)
    for name, expected in zip(("energy", "grad_norm", "kinetic"), zip(*rows, strict=True),
                              strict=True):  # fmt: skip
        torch.testing.assert_close(
            getattr(out.stats, name), torch.stack(expected), rtol=1e-11, atol=1e-12
        )
    assert all(p.requires_grad for p in net.parameters())


def test_schedules_and_values_per_chain():
    """Chain b of a batch is the chain whose options are the b-th values."""
    x0, xi = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None], torch.randn(3, 4, 1).double()
    h, gamma = torch.tensor([0.1, 0.3, 0.2]).double(), torch.linspace(0.5, 2, 4).double()
    tau = torch.rand(3, 4, dtype=torch.float64)

    def run(rows, friction, temperature):
        sampler = UnderdampedLangevinSampler(
            quadratic(1.5), n_steps=3, step_size=lambda k: h[k], friction=friction,
            temperature=temperature,
        )  # fmt: skip
        x = x0[rows]
        return sampler(x, xi=xi[:, rows], velocity=torch.zeros_like(x)).x

    whole = run(slice(None), gamma[None], tau)
    for b in range(4):
        alone = run(slice(b, b + 1), float(gamma[b]), tau[:, b])
        torch.testing.assert_close(alone[0], whole[b], rtol=1e-13, atol=1e-14)


def test_continues_from_key_and_velocity_and_is_independent_of_the_batch():
    x0, key = torch.linspace(-1, 1, 12).reshape(4, 3), cf.Key(5)
    long = UnderdampedLangevinSampler(quadratic(1.0), n_steps=10, step_size=0.5)(x0, key=key)
    half = UnderdampedLangevinSampler(quadratic(1.0), n_steps=5, step_size=0.5)
    first = half(x0, key=key)
    second = half(first.x, key=first.key, velocity=first.velocity)
    assert torch.equal(second.x, long.x)
    assert second.key == long.key
    one = half(x0[2:3], key=key.at_chain(2))
    assert torch.equal(one.x[0], first.x[2])


def test_energy_and_score_agree():
    x0, key = torch.randn(4, 3), cf.Key(0)
    options = {"n_steps": 5, "step_size": 0.2}
    a = UnderdampedLangevinSampler(quadratic(1.0), **options)(x0, key=key)
    b = UnderdampedLangevinSampler(score=lambda x: -x, **options)(x0, key=key)
    c = UnderdampedLangevinSampler(lambda x: -quadratic(1.0)(x), negative_energy=True, **options)(
        x0, key=key
    )
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.x, c.x)


def test_a_chain_that_blows_up():
    def score(x):  # NaN beyond 1
        return torch.where(x > 1, torch.nan, -x)

    x0 = torch.tensor([[0.0], [0.9]])
    velocity = torch.tensor([[0.0], [2.0]])
    options = {"n_steps": 5, "step_size": 0.2, "temperature": 0.0}
    out = UnderdampedLangevinSampler(score=score, on_nonfinite="freeze", **options)(
        x0, velocity=velocity
    )
    assert out.x.isfinite().all()
    assert out.velocity.isfinite().all()
    assert out.x[1, 0] > 1
    with pytest.raises(cf.NonFiniteError) as caught:
        UnderdampedLangevinSampler(score=score, **options)(x0, velocity=velocity)
    assert caught.value.chains.tolist() == [1]
    assert torch.equal(caught.value.x, out.x)
    gone = UnderdampedLangevinSampler(score=score, on_nonfinite="ignore", **options)(
        x0, velocity=velocity
    )
    assert gone.x[1].isnan().all()


def test_a_chain_that_overflows_keeps_its_last_finite_state():
    """h²λ > 4: the state doubles until it leaves float32, with gradients finite till then."""
    options = {"n_steps": 200, "step_size": 5.0, "temperature": 0.0}
    x0 = torch.tensor([[0.0], [1.0]])
    out = UnderdampedLangevinSampler(quadratic(1.0), on_nonfinite="freeze", **options)(
        x0, velocity=x0
    )
    assert out.x.isfinite().all()
    assert out.x[1].abs() > 1e30
    with pytest.raises(cf.NonFiniteError, match="the gradient or state was not finite") as caught:
        UnderdampedLangevinSampler(quadratic(1.0), **options)(x0, velocity=x0)
    assert caught.value.chains.tolist() == [1]
    assert torch.equal(caught.value.x, out.x)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"step_size": -1.0}, "step_size"),
        ({"friction": -1.0}, "friction"),
        ({"temperature": float("nan")}, "temperature"),
        ({"on_nonfinite": "stop"}, "on_nonfinite"),
        ({"friction": [[1.0, 2.0]], "temperature": [[1.0] * 3]}, "friction for 2 and temperature"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        UnderdampedLangevinSampler(quadratic(1.0), **{"n_steps": 5, "step_size": 0.1, **options})
    with pytest.raises(ValueError, match="friction has values for 5 chains, but x0 has 2"):
        UnderdampedLangevinSampler(
            quadratic(1.0), n_steps=1, step_size=0.1, friction=torch.ones(1, 5)
        )(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="velocity must have shape"):
        UnderdampedLangevinSampler(quadratic(1.0), n_steps=1, step_size=0.1)(
            torch.zeros(2, 1), velocity=torch.zeros(2, 2)
        )


def test_a_score_may_use_autograd_and_a_velocity_may_want_gradients():
    """Where the caller has gradients on; none flows to the velocity."""

    def score(x):
        leaf = x.detach().requires_grad_()
        return -torch.autograd.grad(quadratic(1.0)(leaf).sum(), leaf)[0]

    x0, v0 = torch.ones(3, 2), torch.ones(3, 2, requires_grad=True)
    common = {"n_steps": 3, "step_size": 0.2}
    out = UnderdampedLangevinSampler(score=score, **common)(x0, key=cf.Key(0), velocity=v0)
    expected = UnderdampedLangevinSampler(quadratic(1.0), **common)
    torch.testing.assert_close(out.x, expected(x0, key=cf.Key(0), velocity=v0.detach()).x)
    assert not out.x.requires_grad
    assert not out.velocity.requires_grad
    assert torch.equal(v0.detach(), torch.ones(3, 2))


def test_velocities_drawn_for_a_mass():
    x0, common = torch.zeros(5, 2), {"n_steps": 0, "step_size": 0.1, "temperature": 2.0}
    light, heavy = (
        UnderdampedLangevinSampler(quadratic(1.0), mass=mass, **common)(x0, key=cf.Key(0)).velocity
        for mass in (1.0, 4.0)
    )
    torch.testing.assert_close(heavy, light / 2)
    assert light.all()


def test_tables_beside_a_state_in_half_precision():
    x0 = torch.ones(3, 2, dtype=torch.bfloat16)
    ends = [
        UnderdampedLangevinSampler(
            quadratic(1.0), n_steps=2, step_size=h, friction=h, stats=True, on_nonfinite=mode
        )(x0, key=cf.Key(0), velocity=x0)
        for h in (0.25, [0.25, 0.25])
        for mode in ("raise", "ignore")
    ]
    for out in ends:
        assert out.x.dtype == out.velocity.dtype == torch.bfloat16
        torch.testing.assert_close(out.x, ends[0].x, atol=0.02, rtol=0)  # two roundings


@pytest.mark.parametrize("first", [False, True])
def test_no_gradient_flows_to_what_a_score_learns(first):
    """Also where one tensor of several wants it."""
    scale = torch.nn.Parameter(torch.tensor(1.0))

    def score(s):
        learned, plain = -scale * s[0 if first else 1], -s[1 if first else 0]
        return (learned, plain) if first else (plain, learned)

    common = {"n_steps": 2, "step_size": 0.2}
    start = torch.ones(2, 3), torch.ones(2, 3)
    out = UnderdampedLangevinSampler(score=score, **common)(start, key=cf.Key(0))
    plain = UnderdampedLangevinSampler(score=lambda s: (-s[0], -s[1]), **common)
    expected = plain(start, key=cf.Key(0))
    for got, want in ((out.x, expected.x), (out.velocity, expected.velocity)):
        assert not any(t.requires_grad for t in got)
        torch.testing.assert_close(got, want)
