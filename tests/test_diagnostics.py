"""Diagnostics against arviz, and on chains whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext import diagnostics
from coopflow_ext.samplers import (
    LangevinSampler,
    MALASampler,
    SamplerOutput,
    UnderdampedLangevinSampler,
)


def ar1(n: int, chains: int, rho: float, seed: int = 0) -> Tensor:
    """Stationary AR(1) chains, (n, chains)."""
    noise = torch.randn(n, chains, generator=torch.Generator().manual_seed(seed)).double()
    x = torch.empty_like(noise)
    x[0] = noise[0]
    for k in range(1, n):
        x[k] = rho * x[k - 1] + math.sqrt(1 - rho**2) * noise[k]
    return x


def cases() -> dict[str, Tensor]:
    shifted = ar1(200, 4, 0.5, seed=5) + torch.tensor([0.0, 0.0, 0.0, 1.0]).double()
    return {
        "independent": ar1(200, 4, 0.0),
        "slow": ar1(300, 4, 0.95),
        "antithetic": ar1(200, 3, -0.7),
        "odd length": ar1(101, 2, 0.3),
        "one chain": ar1(100, 1, 0.5),
        "very slow": ar1(60, 2, 0.999),
        "short": ar1(8, 2, 0.2),
        "shifted": shifted,
        "ties": ar1(200, 4, 0.5).mul(2).round(),
    }


@pytest.mark.filterwarnings("ignore:.*ArviZ.*:FutureWarning")
@pytest.mark.parametrize("name", list(cases()))
def test_equal_to_arviz(name):
    arviz = pytest.importorskip("arviz")
    x = cases()[name]
    chain_first = x.T.numpy()
    assert diagnostics.ess(x).item() == pytest.approx(
        float(arviz.ess(chain_first, method="bulk")), rel=1e-9
    )
    if x.shape[1] > 1:
        assert diagnostics.split_rhat(x).item() == pytest.approx(
            float(arviz.rhat(chain_first, method="split")), rel=1e-12
        )
    if arviz.__version__.startswith("0."):
        expected = arviz.autocorr(chain_first)
    else:
        array_stats = pytest.importorskip("arviz_stats.base").array_stats
        expected = array_stats.autocorr(chain_first, axis=-1)
    np.testing.assert_allclose(diagnostics.autocorrelation(x).T.numpy(), expected, atol=1e-12)


def test_event_dimensions_are_independent():
    x = torch.stack([ar1(200, 4, rho, seed=k) for k, rho in enumerate((0.0, 0.5, 0.9))], dim=-1)
    x = torch.stack([x, 3 * x + 1], dim=2)
    assert diagnostics.ess(x).shape == diagnostics.split_rhat(x).shape == (2, 3)
    for i in range(3):
        single = diagnostics.ess(x[:, :, 0, i])
        torch.testing.assert_close(diagnostics.ess(x)[:, i], single.expand(2))


def test_known_values():
    """AR(1): autocorrelation ρ^k, and T·B(1 − ρ)/(1 + ρ) effective draws."""
    rho, n, chains = 0.6, 4000, 8
    x = ar1(n, chains, rho)
    acf = diagnostics.autocorrelation(x, max_lag=5).mean(1)
    torch.testing.assert_close(acf, rho ** torch.arange(6).double(), atol=0.02, rtol=0)
    expected = n * chains * (1 - rho) / (1 + rho)
    assert diagnostics.ess(x).item() == pytest.approx(expected, rel=0.1)
    assert diagnostics.split_rhat(x).item() == pytest.approx(1.0, abs=0.005)
    apart = x + torch.arange(chains)
    assert diagnostics.split_rhat(apart) > 1.5


def test_constant_and_nonfinite_samples():
    x = torch.ones(10, 3, 2)
    assert diagnostics.ess(x).tolist() == [30.0, 30.0]
    x[4, 1, 1] = torch.nan
    assert diagnostics.ess(x)[1].isnan()
    assert diagnostics.split_rhat(x)[1].isnan()
    for value in (0.5, 0.1):  # the mean of the latter is rounded
        constant = torch.full((10, 3), value, dtype=torch.float64)
        assert diagnostics.split_rhat(constant).isnan()
        assert diagnostics.autocorrelation(constant).isnan().all()
        constant[:, 1] += 1
        assert diagnostics.split_rhat(constant).isposinf()
    tiny = 1e-20 * ar1(200, 2, 0.9)
    torch.testing.assert_close(diagnostics.ess(tiny), diagnostics.ess(1e20 * tiny))
    assert diagnostics.ess(torch.zeros(10, 3, 0, 2)).shape == (0, 2)
    assert diagnostics.split_rhat(torch.zeros(10, 3, 0)).shape == (0,)


def test_bad_samples():
    with pytest.raises(ValueError, match=r"T ≥ 4"):
        diagnostics.ess(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"B ≥ 2"):
        diagnostics.split_rhat(torch.zeros(10, 1))
    with pytest.raises(TypeError, match="floating-point"):
        diagnostics.ess(torch.zeros(10, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_lag"):
        diagnostics.autocorrelation(torch.zeros(10, 2), max_lag=10)
    for samples in (torch.zeros(10, dtype=torch.complex64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="samples must be real"):
            diagnostics.autocorrelation(samples)
    assert not diagnostics.split_rhat(torch.randn(10, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("estimate", [diagnostics.ess, diagnostics.split_rhat])
def test_estimates_have_no_gradients(estimate):
    samples = torch.randn(10, 2, requires_grad=True)
    assert not estimate(samples).requires_grad
    assert estimate(samples.detach()[:4]).isfinite()


def sampled(**options) -> SamplerOutput:
    energy = lambda x: 0.5 * x.square().sum(1)  # noqa: E731
    sampler = LangevinSampler(energy, n_steps=12, step_size=0.3, **options)
    return sampler(torch.zeros(4, 2), key=cf.Key(0))


@pytest.mark.filterwarnings("ignore:.*ArviZ.*:FutureWarning")
def test_to_arviz():
    pytest.importorskip("arviz")
    out = sampled(return_trajectory=True, thin=5, stats=True)
    data = diagnostics.to_arviz(out, thin=5)
    assert data.posterior["x"].shape == (4, 2, 2)
    np.testing.assert_array_equal(data.posterior["x"].values[:, 1], out.trajectory[1].numpy())
    np.testing.assert_array_equal(
        data.sample_stats["energy"].values[:, 1], out.stats.energy[9].numpy()
    )
    with_start = sampled(return_trajectory=True, thin=5, stats=True, include_start=True)
    data = diagnostics.to_arviz(with_start, thin=5)
    np.testing.assert_array_equal(data.posterior["x"].values[:, 1], out.trajectory[1].numpy())
    with pytest.raises(ValueError, match="thin=2 does not fit"):
        diagnostics.to_arviz(out, thin=2)
    with pytest.raises(ValueError, match="thin must be ≥ 1"):
        diagnostics.to_arviz(out, thin=0)
    with pytest.raises(ValueError, match="no trajectory"):
        diagnostics.to_arviz(sampled())
    half = out._replace(trajectory=out.trajectory.bfloat16(), stats=None)
    assert diagnostics.to_arviz(half).posterior["x"].dtype == np.float32


@pytest.mark.filterwarnings("ignore:.*ArviZ.*:FutureWarning")
@pytest.mark.parametrize("sampler", [MALASampler, UnderdampedLangevinSampler])
def test_outputs_of_the_other_samplers(sampler):
    pytest.importorskip("arviz")
    pytest.importorskip("matplotlib")
    energy = lambda x: 0.5 * x.square().sum(1)  # noqa: E731
    out = sampler(energy, n_steps=12, step_size=0.3, return_trajectory=True, stats=True)(
        torch.ones(4, 2), key=cf.Key(0)
    )
    data = diagnostics.to_arviz(out)
    assert data.posterior["x"].shape == (4, 12, 2)
    np.testing.assert_array_equal(data.sample_stats["energy"].values, out.stats.energy.T.numpy())
    (energies, norms) = diagnostics.plot(out).axes
    np.testing.assert_array_equal(energies.lines[0].get_ydata(), out.stats.energy[:, 0].numpy())
    np.testing.assert_array_equal(norms.lines[0].get_ydata(), out.stats.grad_norm[:, 0].numpy())
    without = sampler(energy, n_steps=12, step_size=0.3, return_trajectory=True)(torch.ones(4, 2))
    assert without.stats is None
    assert not hasattr(diagnostics.to_arviz(without), "sample_stats")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    figure = diagnostics.plot(sampled(stats=True))
    assert [axis.get_ylabel() for axis in figure.axes] == ["energy", "gradient norm"]
    figure.savefig(tmp_path / "traces.png")
    assert (tmp_path / "traces.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no statistics"):
        diagnostics.plot(sampled())
