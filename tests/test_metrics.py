"""Fréchet distance, moments, bits per dimension, feature spaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from coopflow_ext import Key
from coopflow_ext.data import load
from coopflow_ext.flows import realnvp
from coopflow_ext.metrics import (
    FeatureStatistics,
    RunningMoments,
    bits_per_dim,
    feature_space,
    features,
    frechet_distance,
    moment_gap,
)

linalg = pytest.importorskip("scipy.linalg")


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(mean.double(), covariance.double(), 1000)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    a = gaussian(torch.tensor([0.0, 1.0]), torch.diag(torch.tensor([1.0, 4.0])))
    b = gaussian(torch.tensor([3.0, 1.0]), torch.diag(torch.tensor([9.0, 1.0])))
    # ‖Δμ‖² + Σ (σ_a − σ_b)²
    assert frechet_distance(a, b) == pytest.approx(9 + (1 - 3) ** 2 + (2 - 1) ** 2, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rows", [500, 20])  # 20 rows: a singular covariance
def test_frechet_distance_against_scipy(rows: int) -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(40, 40)) / 6
    x, y = rng.normal(size=(rows, 40)) @ mix, rng.normal(size=(rows, 40)) + 0.2
    got = frechet_distance(
        FeatureStatistics.of(torch.tensor(x)), FeatureStatistics.of(torch.tensor(y))
    )
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(cov_x @ cov_y).real
    difference = x.mean(0) - y.mean(0)
    want = difference @ difference + np.trace(cov_x + cov_y - 2 * root)
    assert got == pytest.approx(want, rel=1e-6)


def test_frechet_distance_of_few_rows_to_themselves_is_nothing() -> None:
    rows = torch.randn(20, 512, generator=torch.Generator().manual_seed(0))
    same = FeatureStatistics.of(rows)
    assert abs(frechet_distance(same, same)) < 1e-9 * float(same.covariance.trace())


def test_feature_statistics_refuse_what_has_no_covariance() -> None:
    with pytest.raises(ValueError, match=r"\(n ≥ 2, D\), got \(1, 3\)"):
        FeatureStatistics.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="finite"):
        FeatureStatistics.of(torch.full((3, 3), math.nan))
    with pytest.raises(ValueError, match="one dimension, got 2 and 3"):
        frechet_distance(
            gaussian(torch.zeros(2), torch.eye(2)), gaussian(torch.zeros(3), torch.eye(3))
        )


def test_moment_gap_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, 3, generator=generator)
    y = 0.5 * torch.randn(300, 2, 3, generator=generator) + 1
    moments = [RunningMoments(6), RunningMoments(6)]
    for part in x.split(64):
        moments[0].update(part)
    moments[1].update(y)
    fx, fy = x.flatten(1).double(), y.flatten(1).double()
    want = (fx.mean(0) - fy.mean(0)).norm() + (
        fx.T.cov(correction=0) - fy.T.cov(correction=0)
    ).norm()
    assert moment_gap(*moments) == pytest.approx(want.item(), rel=1e-5)
    assert moment_gap(moments[0], moments[0]) == 0


def test_running_moments_save_and_reset() -> None:
    moments, other = RunningMoments(2), RunningMoments(2)
    moments.update(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    other.load_state_dict({k: v.clone() for k, v in moments.state_dict().items()})
    assert moment_gap(moments, other) == 0
    moments.reset()
    assert float(moments.count) == 0
    assert float(other.count) == 2


def test_bits_per_dim_of_an_untrained_flow_is_that_of_its_prior() -> None:
    # The couplings start as the identity and evaluation mode initialises no ActNorm, so the flow
    # is a standard normal.
    flow = realnvp(dim=4, couplings=2, widths=(8,))
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    log_prob = torch.distributions.Normal(0, 1).log_prob(x).sum(1).mean()
    want = -log_prob.item() / (4 * math.log(2))
    assert bits_per_dim(flow, x, Key(0), batch_size=3) == pytest.approx(want, rel=1e-6)
    assert flow.training


@pytest.mark.parametrize("training", [True, False])
def test_bits_per_dim_leaves_the_mode_of_every_module(training: bool) -> None:
    flow = realnvp(dim=4, couplings=2, widths=(8,)).train(training)
    flow.transform.transforms[0].train(not training)
    modes = [module.training for module in flow.modules()]
    bits_per_dim(flow, torch.randn(5, 4), Key(0))
    assert [module.training for module in flow.modules()] == modes


def test_bits_per_dim_of_images_does_not_depend_on_the_batch_size() -> None:
    flow = realnvp(image_shape=(1, 8, 8), net="mlp", couplings=2, widths=(8,), levels=17)
    data = load("digits")
    x = data.decode(data.held_out[:20])
    whole = bits_per_dim(flow, x, Key(0))
    assert bits_per_dim(flow, x, Key(0), batch_size=7) == pytest.approx(whole, rel=1e-6)
    assert whole != bits_per_dim(flow, x, Key(1))


def test_bits_per_dim_of_parts_are_those_of_the_whole() -> None:
    """Each drawn as the chains of its rows."""
    flow = realnvp(image_shape=(1, 8, 8), net="mlp", couplings=2, widths=(8,), levels=17)
    data = load("digits")
    x = data.decode(data.held_out[:20])
    key = Key(1).at_chain(3)
    parts = [
        bits_per_dim(flow, x[:8], key, batch_size=5),
        bits_per_dim(flow, x[8:], key.at_chain(11), batch_size=5),
    ]
    whole = bits_per_dim(flow, x, key)
    assert (8 * parts[0] + 12 * parts[1]) / 20 == pytest.approx(whole, rel=1e-6)
    assert whole != bits_per_dim(flow, x, Key(1))


def test_digit_features() -> None:
    data = load("digits")
    space = feature_space(data)
    assert space.name == "digit-classifier-64"
    assert space.accuracy is not None
    assert space.accuracy > 0.97
    held_out = data.decode(data.held_out)
    assert space.features(held_out).shape == (450, 64)
    train = space.statistics(data.decode(data.train))
    distance = frechet_distance(train, space.statistics(held_out))
    shuffled = held_out.flatten(1)[:, torch.randperm(64, generator=torch.Generator())]
    far = frechet_distance(train, space.statistics(shuffled.view_as(held_out)))
    assert 0 < distance < 10 < far


def test_features_of_other_images_see_the_difference_to_noise() -> None:
    data = load("patches")
    space = feature_space(data)
    assert space.name == "random-conv-64"
    train = space.statistics(data.decode(data.train))
    held_out = data.decode(data.held_out)
    noise = torch.rand(held_out.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    near = frechet_distance(train, space.statistics(held_out))
    assert near < frechet_distance(train, space.statistics(noise)) / 2
    assert frechet_distance(train, feature_space(data).statistics(held_out)) == near


def test_moments_that_do_not_fit_say_how_many_bytes() -> None:
    with pytest.raises(RuntimeError, match=rf"covariance of .* would take {2**54:,} bytes"):
        RunningMoments(2**26)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: default_dtype(torch.float64), lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "float64", "device"],
)  # fmt: skip
def test_the_digits_features_do_not_depend_on_who_asks_first(
    monkeypatch: pytest.MonkeyPatch, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    data = load("digits")
    expected = feature_space(data)
    monkeypatch.setattr(features, "_digits_space", features._digits_space.__wrapped__)
    with mode():
        found = feature_space(data)
    assert found.accuracy == expected.accuracy
    x = data.decode(data.held_out[:50])
    assert torch.equal(found.features(x), expected.features(x))


def test_running_moments_are_float32_whatever_the_default() -> None:
    with default_dtype(torch.float64):
        moments = RunningMoments(3)
        moments.update(torch.ones(4, 3))
    assert {t.dtype for t in moments.state_dict().values()} == {torch.float32}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
