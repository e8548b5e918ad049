"""The presets of annealed, latent and time-dependent loops, each against the loop of its file,
written anew in plain PyTorch with supplied normals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext import presets
from coopflow_ext.energies import MLPEnergy

B, D = 5, 3
SIGMAS = torch.tensor([1.0, 0.5, 0.25, 0.1], dtype=torch.float64)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def score(x: Tensor, y: Tensor) -> Tensor:
    """Of a mixture of two Gaussians smeared by the level that y, (B,), names."""
    assert y.shape == (len(x),)
    assert y.dtype == torch.int64
    variance = 0.04 + SIGMAS[y][:, None] ** 2
    return (torch.tanh(x / variance) - x) / variance


def gradient(function, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def annealed(x: Tensor, xi: Tensor, n_steps_each: int, step_lr: float) -> Tensor:
    rows = iter(xi)
    for c, sigma in enumerate(SIGMAS):
        labels = torch.full((len(x),), c)
        step_size = step_lr * (sigma / SIGMAS[-1]) ** 2
        for _ in range(n_steps_each):
            noise = next(rows) * (2 * step_size).sqrt()
            x = x + step_size * score(x, labels) + noise
    return x


def test_ncsn():
    x0, xi = normals(B, D), normals(4 * 7, B, D, seed=1)
    sampler = presets.ncsn(score, sigmas=SIGMAS, n_steps_each=7, step_lr=1e-3)
    close(sampler(x0, xi=xi).x, annealed(x0, xi, 7, 1e-3))
    assert presets.ncsn(score, sigmas=SIGMAS).plan.n_steps == 400


@pytest.mark.parametrize("denoise", [True, False])
def test_ncsnv2(denoise):
    x0, xi = normals(B, D), normals(4 * 6, B, D, seed=1)
    off = {} if denoise else {"denoise": None}
    sampler = presets.ncsnv2(score, sigmas=SIGMAS, n_steps_each=6, step_lr=1e-3, **off)
    expected = annealed(x0, xi, 6, 1e-3)
    if denoise:
        expected = expected + SIGMAS[-1] ** 2 * score(expected, torch.full((B,), 3))
    close(sampler(x0, xi=xi).x, expected)
    assert presets.ncsnv2(score, sigmas=SIGMAS).plan.n_steps == 801


def test_the_name_of_the_label():
    def named(x: Tensor, labels: Tensor) -> Tensor:
        return score(x, labels)

    x0 = normals(B, D)
    common = {"sigmas": SIGMAS, "n_steps_each": 2}
    got = presets.ncsn(named, argument="labels", **common)(x0, key=cf.Key(1)).x
    assert torch.equal(got, presets.ncsn(score, **common)(x0, key=cf.Key(1)).x)
    with pytest.raises(ValueError, match="'y', which score does not take"):
        presets.ncsn(named, **common)


@pytest.mark.parametrize("over", ["batch", "chain"])
@pytest.mark.parametrize("alpha", [1.0, torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])])
def test_score_sde_corrector(over, alpha):
    def smooth(x: Tensor, t: Tensor) -> Tensor:
        return -x / (1 + t[:, None]) - torch.cos(x)

    x0, xi, t = normals(B, D), normals(5, B, D, seed=1), torch.rand(B, dtype=torch.float64)
    a = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1).expand(B)
    x = x0
    for noise in xi:
        grad = smooth(x, t)
        grad_norm, noise_norm = grad.norm(dim=-1), noise.norm(dim=-1)
        if over == "batch":
            grad_norm, noise_norm = grad_norm.mean(), noise_norm.mean()
        step_size = (0.16 * noise_norm / grad_norm) ** 2 * 2 * a
        x = x + step_size[:, None] * grad + torch.sqrt(step_size * 2)[:, None] * noise
    own = {} if over == "batch" else {"snr_over": "chain"}
    sampler = presets.score_sde_corrector(smooth, n_steps=5, alpha=alpha, **own)
    close(sampler(x0, xi=xi, model_kwargs={"t": t}).x, x)


def test_lebm_prior():
    net = MLPEnergy(D).double()
    z0, xi = normals(B, D), normals(9, B, D, seed=1)
    z, s, sigma = z0, 0.4, 1.5
    for noise in xi:
        z = z - 0.5 * s * s * (gradient(net, z) + z / (sigma * sigma)) + s * noise
    sampler = presets.lebm_prior(net, n_steps=9, reference_std=sigma)
    close(sampler(z0, xi=xi).x, z)
    assert presets.lebm_prior(net).plan.n_steps == 60


def test_lebm_posterior():
    torch.manual_seed(0)
    net = MLPEnergy(D).double()
    decoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    z0, xi, image = normals(B, D), normals(9, B, D, seed=1), normals(B, 4, seed=2)
    z, s, sigma = z0, 0.1, 0.3
    for noise in xi:
        likelihood = gradient(
            lambda z: (
                nn.functional.mse_loss(decoder(z), image, reduction="sum") / (2 * sigma * sigma)
            ),
            z,
        )
        z = z - 0.5 * s * s * (likelihood + gradient(net, z) + z) + s * noise
    sampler = presets.lebm_posterior(net, decoder, n_steps=9)
    close(sampler(z0, xi=xi, model_kwargs={"observed": image}).x, z)
    assert all(p.grad is None for p in decoder.parameters())
    assert presets.lebm_posterior(net, decoder).plan.n_steps == 20


@pytest.mark.parametrize("k", [1.0, 1.7])
def test_cdrl(k):
    """Chains at levels of their own, the noisiest of which has no pull."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        return -0.03 * (0.3 * x.square() + torch.sin(2 * x)).sum(1) * (1 + t)

    logsnr_max = 9.8
    t = torch.tensor([1.0, 2.0, 3.0, 6.0, 2.0], dtype=torch.float64)
    logsnr_t, logsnr_s = 8 - 2.0 * t, 10 - 2.0 * t
    is_final = t == 6
    a_t, a_s = torch.sigmoid(logsnr_t), torch.sigmoid(logsnr_s)
    sigma = (1 - a_t / a_s).sqrt()
    ct_square = (1 - a_s).sqrt() / math.sqrt(1 - 1 / (1 + math.exp(-logsnr_max)))
    sz_square = 4e-4 * ct_square * k**2 * sigma**2
    x0, x_t, xi = normals(B, D), normals(B, D, seed=3), normals(15, B, D, seed=1)
    x = x0
    for noise in xi:

        def en(x):
            pull = (x - x_t).square().sum(1) * ct_square * 2e-4 * (1.0 - is_final.double())
            return (network(x, t) - pull) * k**2

        x = x + 0.5 * gradient(en, x) + sz_square.sqrt()[:, None] * noise
    sampler = presets.cdrl(
        network, step_size=sz_square.sqrt(), pull_std=sigma, network_scale=k, is_final=is_final
    )
    close(sampler(x0, xi=xi, x_ref=x_t, model_kwargs={"t": t}).x, x)


@pytest.mark.parametrize("cutoff", [0.4, 1.0])
@pytest.mark.parametrize("at_data", [None, [True, False, False, True, False]])
def test_energy_matching(cutoff, at_data):
    dt, epsilon_max = 0.1, 0.3

    def potential(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        return (0.1 * x.square() + torch.sin(2 * x)).sum(1) * (1 + t)

    def epsilon(t: float, at_data: bool) -> float:
        if at_data:
            return epsilon_max
        if t < cutoff:
            return 0.0
        return epsilon_max * (t - cutoff) / (1 - cutoff) if t < 1 else epsilon_max

    x0, xi = 0.3 * normals(B, D), normals(15, B, D, seed=1)
    x = x0
    for step, noise in enumerate(xi):
        t = step * dt
        g = gradient(lambda x, t=t: potential(x, torch.full((B,), t, dtype=x.dtype)), x)
        e = torch.tensor([epsilon(t, flag) for flag in at_data or [False] * B], dtype=x.dtype)
        x = x - dt * g + (2 * dt * e).sqrt()[:, None] * noise
    sampler = presets.energy_matching(
        potential, epsilon_max=epsilon_max, time_cutoff=cutoff, n_steps=15, step_size=dt,
        at_data=None if at_data is None else torch.tensor(at_data),
    )  # fmt: skip
    got = sampler(x0, xi=xi).x
    close(got, x.clamp(-1, 1))
    assert got.unique().numel() > B * D // 2


@pytest.mark.parametrize("mu", [None, 0.3])
def test_eqm(mu):
    def model(x: Tensor, y: Tensor) -> Tensor:
        return -(0.6 * x + 2 * torch.cos(2 * x)) * (1 + y[:, None])

    stepsize, y = 0.05, torch.arange(B)
    x0 = xt = normals(B, D)
    m = torch.zeros_like(xt)
    for _ in range(30):
        out = model(xt if mu is None else xt + stepsize * m * mu, y)
        m = out
        xt = xt + out * stepsize
    sampler = presets.eqm(model, n_steps=30, step_size=stepsize, momentum=mu)
    close(sampler(x0, model_kwargs={"y": y}).x, xt)
    assert presets.eqm(model).plan.n_steps == 249


def test_wrong_letters():
    for last in (-0.1, 0.0):
        with pytest.raises(ValueError, match="sigmas must be"):
            presets.ncsn(score, sigmas=[1.0, last])
    with pytest.raises(ValueError, match="n_steps_each must be ≥ 1"):
        presets.ncsnv2(score, sigmas=SIGMAS, n_steps_each=0)
    with pytest.raises(ValueError, match="likelihood_std must be > 0"):
        presets.lebm_posterior(score, score, likelihood_std=0.0)
    with pytest.raises(ValueError, match="pull_std must be positive"):
        presets.cdrl(score, step_size=0.1, pull_std=0.0)
    with pytest.raises(ValueError, match="epsilon_max must be ≥ 0"):
        presets.energy_matching(score, epsilon_max=-1.0)
