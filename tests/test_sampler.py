"""LangevinSampler: its update against plain PyTorch, the exact laws, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext.energies import GaussianMixtureEnergy, MLPEnergy
from coopflow_ext.samplers import LangevinSampler

T = 20


def quadratic(x: Tensor) -> Tensor:
    """U = ½‖x‖²."""
    return 0.5 * x.square().flatten(1).sum(1)


def start(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator, dtype=dtype)


def plain_loop(energy, x, xi, drift, noise, lo=-math.inf, hi=math.inf):
    for z in xi:
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        x = (x - drift * grad + noise * z).clamp(lo, hi)
    return x


def test_equals_the_plain_loop_with_supplied_normals():
    energy = MLPEnergy(3)
    x0, xi = start(16, 3), torch.randn(T, 16, 3)
    out = LangevinSampler(energy, n_steps=T, step_size=0.1, clamp=(-1, 1))(x0, xi=xi)
    expected = plain_loop(energy, x0, xi, 0.005, 0.1, -1, 1)
    torch.testing.assert_close(out.x, expected, rtol=1e-5, atol=1e-6)


def test_noise_is_that_of_the_key_and_the_key_advances():
    sampler = LangevinSampler(quadratic, n_steps=T, drift=0.1, noise=0.3)
    x0, key = start(8, 5), cf.Key(3, time=4)
    out = sampler(x0, key=key)
    xi = torch.stack([cf.ops.normal((8, 5), key.tensor(), step=k) for k in range(T)])
    torch.testing.assert_close(out.x, sampler(x0, xi=xi).x, rtol=1e-5, atol=1e-5)
    assert out.key == cf.Key(3, time=4 + T)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 1, 1, 1)])
def test_energy_shapes_and_signs_and_score_agree(shape):
    x0, key = start(6, 4), cf.Key(0)
    options = {"n_steps": T, "step_size": 0.2}
    expected = LangevinSampler(quadratic, **options)(x0, key=key).x
    shaped = LangevinSampler(lambda x: quadratic(x).reshape(shape), **options)
    negative = LangevinSampler(
        lambda x: -quadratic(x).reshape(shape), negative_energy=True, **options
    )
    score = LangevinSampler(score=lambda x: -x, **options)
    for sampler in (shaped, negative, score):
        assert torch.equal(sampler(x0, key=key).x, expected)


def test_gaussian_law_1():
    """Mean and variance after T steps, and the stationary variance 1/(λ(1 − δ²λ/4))."""
    lam, delta, n_steps, batch, dim = 2.0, 0.6, 40, 2000, 50
    a = 1 - delta**2 * lam / 2
    x0 = 1.0 + 0.5 * cf.ops.normal((batch, dim), cf.Key(1).tensor())
    out = LangevinSampler(lambda x: lam * quadratic(x), n_steps=n_steps, step_size=delta)(
        x0, key=cf.Key(2)
    )
    n = batch * dim
    mean = a**n_steps
    var = a ** (2 * n_steps) * 0.25 + delta**2 * (1 - a ** (2 * n_steps)) / (1 - a**2)
    assert abs(out.x.mean().item() - mean) < 5 * math.sqrt(var / n)
    assert abs(out.x.var().item() / var - 1) < 5 * math.sqrt(2 / n)
    assert var == pytest.approx(1 / (lam * (1 - delta**2 * lam / 4)), rel=1e-6)


def test_noise_free_energy_never_rises_law_2():
    energy = GaussianMixtureEnergy(torch.tensor([[-1.0, 0.0], [1.5, 0.5]]))
    sampler = LangevinSampler(energy, n_steps=60, drift=0.3, noise=0.0, stats=True)
    stats = sampler(3 * start(64, 2), key=cf.Key(0)).stats
    assert (stats.energy.diff(dim=0) <= 1e-6).all()
    assert stats.energy[-1].mean() < stats.energy[0].mean() - 1


def test_x0_and_parameters_are_left_as_they_were():
    energy = MLPEnergy(2)
    next(energy.parameters()).requires_grad_(False)
    before = [(p.requires_grad, p.grad) for p in energy.parameters()]
    x0 = start(4, 2).requires_grad_()
    copy = x0.detach().clone()
    out = LangevinSampler(energy, n_steps=3, step_size=0.1)(x0, key=cf.Key(0))
    assert torch.equal(x0, copy)
    assert x0.requires_grad
    assert not out.x.requires_grad
    assert [(p.requires_grad, p.grad) for p in energy.parameters()] == before


def test_parameters_are_restored_after_an_error():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLPEnergy(2)

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("inside")

    energy = Broken()
    with pytest.raises(KeyError, match="inside"):
        LangevinSampler(energy, n_steps=3, step_size=0.1)(start(4, 2))
    assert all(p.requires_grad for p in energy.parameters())
