"""Energies and scores that know their step, against loops in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from test_sampler_graph import recorded  # noqa: F401
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext.energies import GaussianEnergy, MLPEnergy
from coopflow_ext.samplers import LangevinSampler

T, B, D = 21, 4, 3
KEY = cf.Key(5)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def energy(x: Tensor, sigma: Tensor, y: Tensor | None = None, shift: float = 0.0) -> Tensor:
    u = (x - shift).square().sum(1) / sigma.square()
    return u if y is None else u + (x * y[:, None]).sum(1)


def plain(x: Tensor, xi: Tensor, drift: Tensor, sigma: Tensor, **kwargs) -> Tensor:
    for k, z in enumerate(xi):
        leaf = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(energy(leaf, sigma[k], **kwargs).sum(), leaf)
        x = x - drift[k] * g + (2 * drift[k]) ** 0.5 * z
    return x


SIGMA = torch.linspace(2, 0.3, T, dtype=torch.float64)
DRIFT = 0.05 * SIGMA**2


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_a_number_at_each_step(request, captured, compile):
    if captured:
        request.getfixturevalue("recorded")
    x0, xi, y = normals(B, D), normals(T, B, D, seed=1), normals(B, seed=2)
    sampler = LangevinSampler(energy, n_steps=T, drift=DRIFT, compile=compile)
    for n in (T, 5):
        got = sampler(
            x0, xi=xi[:n], n_steps=n, drift=DRIFT[:n], step_kwargs={"sigma": SIGMA[:n]},
            model_kwargs={"y": y, "shift": 0.2},
        ).x  # fmt: skip
        torch.testing.assert_close(got, plain(x0, xi[:n], DRIFT, SIGMA, y=y, shift=0.2))


@pytest.mark.parametrize("captured", [False, True])
def test_values_for_each_chain(request, captured):
    if captured:
        request.getfixturevalue("recorded")
    x0, xi = normals(B, D), normals(T, B, D, seed=1)
    sigma = SIGMA[:, None] * torch.linspace(1, 2, B, dtype=torch.float64)
    sampler = LangevinSampler(energy, n_steps=T, drift=DRIFT)
    got = sampler(x0, xi=xi, step_kwargs={"sigma": sigma}).x
    torch.testing.assert_close(got, plain(x0, xi, DRIFT, sigma))
    one_for_all = sampler(x0, xi=xi, step_kwargs={"sigma": SIGMA[:, None]}).x
    torch.testing.assert_close(one_for_all, plain(x0, xi, DRIFT, SIGMA))


def test_one_capture_serves_all_values(recorded):  # noqa: F811
    sampler = LangevinSampler(energy, n_steps=T, drift=DRIFT, step_kwargs={"sigma": SIGMA})
    for scale in (1.0, 2.0):
        got = sampler(normals(B, D), key=KEY, step_kwargs={"sigma": scale * SIGMA}).x
        alone = LangevinSampler(energy, n_steps=T, drift=DRIFT, cuda_graph=False)
        expected = alone(normals(B, D), key=KEY, step_kwargs={"sigma": scale * SIGMA}).x
        assert torch.equal(got, expected)
    assert recorded.made == 1


def test_what_each_step_is_given():
    seen = []

    def score(x: Tensor, sigma: Tensor, label: Tensor, frame: Tensor) -> Tensor:
        seen.append((sigma, label, frame))
        return -x / sigma

    step_kwargs = {
        "sigma": torch.arange(1, 4),
        "label": torch.arange(3)[:, None],
        "frame": normals(3, 2, 5),
    }
    LangevinSampler(score=score, n_steps=3, step_size=0.1)(
        torch.zeros(2, 5), key=KEY, step_kwargs=step_kwargs
    )
    for k, (sigma, label, frame) in enumerate(seen):
        assert sigma.shape == ()
        assert sigma.dtype == torch.int64
        assert sigma == k + 1
        assert label.tolist() == [k, k]
        assert torch.equal(frame, step_kwargs["frame"][k].float())  # as x is


def test_the_samplers_own_rows_and_shorter_calls():
    sampler = LangevinSampler(energy, n_steps=T, drift=DRIFT, step_kwargs={"sigma": SIGMA})
    x0, xi = normals(B, D), normals(T, B, D, seed=1)
    torch.testing.assert_close(sampler(x0, xi=xi).x, plain(x0, xi, DRIFT, SIGMA))
    short = sampler(x0, xi=xi[:6], n_steps=6).x
    torch.testing.assert_close(short, plain(x0, xi[:6], DRIFT, SIGMA))


@pytest.mark.parametrize("checkpoint_every", [None, 4])
def test_gradients_flow_to_and_through(checkpoint_every):
    x0, xi = normals(B, D).requires_grad_(), normals(T, B, D, seed=1)
    sigma = SIGMA.clone().requires_grad_()
    sampler = LangevinSampler(
        energy, n_steps=T, drift=DRIFT, differentiable=True, checkpoint_every=checkpoint_every
    )
    got = sampler(x0, xi=xi, step_kwargs={"sigma": sigma}).x
    x, wanted_sigma = x0.detach().requires_grad_(), SIGMA.clone().requires_grad_()
    out = x
    for k, z in enumerate(xi):
        out = out - DRIFT[k] * 2 * out / wanted_sigma[k] ** 2 + (2 * DRIFT[k]) ** 0.5 * z
    torch.testing.assert_close(got, out)
    got_grads = torch.autograd.grad(got.square().sum(), (x0, sigma))
    wanted = torch.autograd.grad(out.square().sum(), (x, wanted_sigma))
    torch.testing.assert_close(got_grads, wanted)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = MLPEnergy(D)

    def forward(self, x: Tensor, *, sigma: Tensor) -> Tensor:
        return self.net(x) / sigma


def test_a_whole_chain_kernel_does_not_take_them():
    with pytest.raises(ValueError, match=r"kernel=True.*step_kwargs"):
        LangevinSampler(GaussianEnergy(torch.zeros(D), torch.eye(D)), n_steps=T, drift=0.1,
                        kernel=True)(torch.zeros(B, D), step_kwargs={"x": SIGMA})  # fmt: skip


def refused(step_kwargs, match, *, error=ValueError, function=energy, **call):
    sampler = LangevinSampler(function, n_steps=T, drift=DRIFT)
    with pytest.raises(error, match=match):
        sampler(normals(B, D), step_kwargs=step_kwargs, **call)


def test_bad_rows():
    refused({"sigma": SIGMA[:-1]}, f"step_kwargs\\['sigma'\\].*each of {T} steps, got {T - 1}")
    refused({"sigma": torch.ones(T, 7)}, "step_kwargs\\['sigma'\\].*each of 4 chains")
    refused({"sigma": torch.ones(())}, "step_kwargs\\['sigma'\\].*row for each step")
    refused({"sigma": 1.0}, "step_kwargs\\['sigma'\\] must be a tensor", error=TypeError)
    refused([SIGMA], "step_kwargs must be a mapping", error=TypeError)
    refused({"sigma": SIGMA}, "'sigma' is in both", model_kwargs={"sigma": 1.0})


def test_an_energy_that_refuses_a_name():
    refused({"time": SIGMA}, "'time', which energy does not take.*x, sigma")
    refused({"time": SIGMA}, "'time', which energy does not take", function=Noisy().double())
    refused({"sigma": SIGMA}, "'sigma', which energy does not take", function=MLPEnergy(D).double())
    with pytest.raises(ValueError, match="'time', which score does not take"):
        LangevinSampler(score=lambda x: -x, n_steps=T, drift=0.1, step_kwargs={"time": SIGMA})


def test_rows_of_a_shorter_call_and_the_last_of_them_again():
    """The sampler's first rows count; those of a call must be as many as its steps."""
    seen = []

    def score(x: Tensor, sigma: Tensor, /, level: Tensor) -> Tensor:
        seen.append(float(level))
        return -x

    common = {"n_steps": 4, "drift": 0.01, "denoise": 0.01}
    common["step_kwargs"] = {"level": torch.arange(4.0)}
    with pytest.raises(TypeError, match="sigma"):
        LangevinSampler(score=score, **common)(normals(B, D), n_steps=2)
    with pytest.raises(ValueError, match="'sigma', which score does not take"):
        LangevinSampler(score=score, n_steps=4, drift=0.01, step_kwargs={"sigma": SIGMA[:4]})

    def plain_score(x: Tensor, level: Tensor) -> Tensor:
        seen.append(float(level))
        return -x

    sampler = LangevinSampler(score=plain_score, **common)
    sampler(normals(B, D), n_steps=2)
    assert seen == [0.0, 1.0, 1.0]
    for rows in (1, 3):
        with pytest.raises(ValueError, match=r"'level'\] must have a row for each of 2 steps"):
            sampler(normals(B, D), n_steps=2, step_kwargs={"level": torch.arange(float(rows))})


def test_names_of_rows():
    """Text, and whatever an energy of any arguments takes."""
    refused({1: SIGMA}, "step_kwargs must be a mapping from names", error=TypeError)

    def any_names(x: Tensor, **given: Tensor) -> Tensor:
        return energy(x, given["sigma"])

    options = {"n_steps": T, "drift": DRIFT, "step_kwargs": {"sigma": SIGMA}}
    ends = [LangevinSampler(of, **options)(normals(B, D), key=KEY).x for of in (energy, any_names)]
    assert torch.equal(*ends)
