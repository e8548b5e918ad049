"""What loops do between, before and after steps: after_step, denoise, include_start."""

from __future__ import annotations

import pytest
import torch
from test_sampler_graph import recorded  # noqa: F401
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext.energies import MLPEnergy
from coopflow_ext.samplers import LangevinSampler

T, B, D = 21, 4, 3
KEY = cf.Key(5)
DRIFT, NOISE = 0.05, 0.2


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def energy(x: Tensor) -> Tensor:
    return (0.4 * x.square() + torch.sin(2 * x)).sum(1)


def gradient(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(energy(leaf).sum(), leaf)[0]


def on_sphere(x: Tensor, step: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True) * (1 + 0.1 * step)


def in_place(x: Tensor, step: Tensor) -> None:
    x[:, 0] = step.to(x.dtype) / 10


def plain(x, xi, *, after, noise_first=False):
    states = [x]
    for k, z in enumerate(xi):
        x = x + NOISE * z if noise_first else x
        x = x - DRIFT * gradient(x)
        x = x if noise_first else x + NOISE * z
        x = after(x, torch.tensor(k)) if after is on_sphere else x
        if after is in_place:
            x[:, 0] = k / 10
        states.append(x)
    return torch.stack(states)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("after", [on_sphere, in_place])
@pytest.mark.parametrize("options", [
    {}, {"noise_before_gradient": True}, {"on_nonfinite": "ignore"},
    {"noise_before_gradient": True, "on_nonfinite": "ignore"},
    {"differentiable": True}, {"differentiable": "last"},
])  # fmt: skip
def test_after_step(request, captured, after, options):
    if captured:
        request.getfixturevalue("recorded")
    x0, xi = normals(B, D), normals(T, B, D, seed=1)
    before = x0.clone()
    sampler = LangevinSampler(
        energy, n_steps=T, drift=DRIFT, noise=NOISE, after_step=after, return_trajectory=True,
        include_start=True, **options,
    )  # fmt: skip
    out = sampler(x0, xi=xi)
    noise_first = options.get("noise_before_gradient", False)
    expected = plain(x0.clone(), xi, after=after, noise_first=noise_first)
    torch.testing.assert_close(out.trajectory, expected)
    torch.testing.assert_close(out.x, expected[-1])
    assert torch.equal(x0, before)


def test_after_step_leaves_a_stopped_chain_alone():
    def breaks(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 50, torch.nan, 1.0) * x.square().sum(1)

    x0 = torch.zeros(B, D)
    x0[1, 0] = 100.0
    sampler = LangevinSampler(
        breaks, n_steps=3, step_size=0.1, on_nonfinite="freeze", after_step=lambda x, k: x.zero_()
    )
    out = sampler(x0, key=KEY)
    assert torch.equal(out.x, x0)
    assert out.frozen_at.tolist() == [3, 0, 3, 3]


def test_after_step_of_several_tensors_and_autocast():
    """Both are given in the caller's structure, and the model's copy of x is kept up to date."""
    kinds = []

    def net(state):
        return state[0].square().sum(1) + state[1].square().sum((1, 2))

    def after(state, step):
        kinds.append((type(state), state[0].dtype, torch.is_autocast_enabled("cpu")))
        return [state[0] * 0 + 1, state[1] + 1]

    x0 = [torch.zeros(B, D), torch.zeros(B, 2, 2)]
    sampler = LangevinSampler(
        net, n_steps=2, drift=0.5, noise=0.0, after_step=after, autocast=torch.bfloat16
    )
    out = sampler(x0, key=KEY)
    assert torch.equal(out.x[0], torch.ones(B, D))
    torch.testing.assert_close(out.x[1], torch.ones(B, 2, 2))  # ((0 + 1) − 1) + 1
    assert set(kinds) == {(list, torch.float32, False)}


def test_inpainting_with_a_whole_chain_kernel_is_refused_and_runs_step_by_step():
    net = MLPEnergy(D)
    with pytest.raises(ValueError, match="after_step needs steps one by one"):
        LangevinSampler(net, n_steps=2, drift=0.1, kernel=True, after_step=in_place)
    sampler = LangevinSampler(net, n_steps=2, drift=0.1, after_step=in_place)
    assert torch.equal(sampler(torch.zeros(B, D)).x[:, 0], torch.full((B,), 0.1))


def test_after_step_returns_a_state():
    def run(after):
        LangevinSampler(energy, n_steps=1, drift=0.1, after_step=after)(normals(B, D))

    with pytest.raises(ValueError, match="what after_step returns must have shape"):
        run(lambda x, k: x[:2])
    with pytest.raises(TypeError, match="after_step must return x or None, got float"):
        run(lambda x, k: 1.0)
    with pytest.raises(TypeError, match="after_step must be callable"):
        run(1.0)


class Recovery(nn.Module):
    """U(x, t) + ‖x − x_ref‖²/(2σ²), where x_ref is the state with which a level began."""

    def __init__(self, n_steps_each: int, shrink: Tensor) -> None:
        super().__init__()
        self.n_steps_each = n_steps_each
        self.register_buffer("shrink", shrink)
        self.register_buffer("x_ref", torch.zeros(B, D, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, sigma: Tensor) -> Tensor:
        pull = (x - self.x_ref).square().sum(1) / (2 * sigma**2)
        return energy(x) / (1 + t) + pull

    def next_level(self, x: Tensor, step: Tensor) -> Tensor:
        over = (step + 1) % self.n_steps_each == 0
        x = torch.where(over, x / self.shrink[step // self.n_steps_each], x)
        self.x_ref.copy_(torch.where(over, x, self.x_ref))
        return x


@pytest.mark.parametrize("captured", [False, True])
def test_levels_of_recovery_likelihood_in_one_call(request, captured):
    """From the noisiest level on: K steps pulled to where the level began, then x/a."""
    if captured:
        request.getfixturevalue("recorded")
    K, levels = 7, 3
    t = torch.arange(levels).flip(0)
    sigma = torch.tensor([0.8, 0.5, 0.3], dtype=torch.float64)
    shrink = torch.tensor([0.9, 0.95, 1.0], dtype=torch.float64)
    step_size = 0.2 * sigma
    x0, xi = normals(B, D), normals(levels * K, B, D, seed=1)

    x, rows = x0, iter(xi)
    for i in range(levels):
        x_ref = x
        for _ in range(K):
            g = gradient(x) / (1 + t[i]) + (x - x_ref) / sigma[i] ** 2
            x = x - step_size[i] ** 2 / 2 * g + step_size[i] * next(rows)
        x = x / shrink[i]

    model = Recovery(K, shrink)
    sampler = LangevinSampler(
        model,
        n_steps=levels * K,
        step_size=step_size.repeat_interleave(K),
        step_kwargs={"t": t.repeat_interleave(K), "sigma": sigma.repeat_interleave(K)},
        after_step=model.next_level,
    )
    for _ in range(2):
        model.x_ref.copy_(x0)
        torch.testing.assert_close(sampler(x0, xi=xi).x, x)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("thin", [1, 2])
def test_include_start(request, captured, kernel, thin):
    if captured:
        request.getfixturevalue("recorded")
    net, x0 = MLPEnergy(D), normals(B, D).float()
    common = {"n_steps": T, "step_size": 0.1, "return_trajectory": True, "thin": thin}
    with_start = LangevinSampler(net, kernel=kernel, include_start=True, **common)
    without = LangevinSampler(net, kernel=kernel, **common)
    for n_steps in (T, 3, 0):
        got = with_start(x0, key=KEY, n_steps=n_steps).trajectory
        assert torch.equal(got[0], x0)
        assert torch.equal(got[1:], without(x0, key=KEY, n_steps=n_steps).trajectory)


def test_include_start_carries_gradients():
    x0 = normals(B, D).requires_grad_()
    sampler = LangevinSampler(
        energy, n_steps=2, step_size=0.1, return_trajectory=True, include_start=True,
        differentiable=True,
    )  # fmt: skip
    (g,) = torch.autograd.grad(sampler(x0, key=KEY).trajectory[0].sum(), x0)
    assert torch.equal(g, torch.ones_like(x0))


def test_include_start_needs_a_trajectory():
    with pytest.raises(ValueError, match="include_start=True needs return_trajectory=True"):
        LangevinSampler(energy, n_steps=1, drift=0.1, include_start=True)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"noise_before_gradient": True}, {"clamp": (-0.4, 0.4), "clamp_when": "end"},
    {"noise": 0.0}, {"differentiable": True},
])  # fmt: skip
def test_denoise_is_one_more_step_without_noise(request, captured, options):
    if captured:
        request.getfixturevalue("recorded")
    x0, xi = normals(B, D), normals(T, B, D, seed=1)
    common = {"n_steps": T, "drift": DRIFT, "noise": NOISE, **options}
    clamp = {name: common.pop(name) for name in ("clamp", "clamp_when") if name in common}
    sampler = LangevinSampler(energy, denoise=0.3, stats=True, **common, **clamp)
    alone = LangevinSampler(energy, **common)
    for n_steps in (T, 5, 0):
        out = sampler(x0, xi=xi[:n_steps], n_steps=n_steps, key=KEY)
        x = alone(x0, xi=xi[:n_steps], n_steps=n_steps).x.detach()
        expected = x - 0.3 * gradient(x)
        expected = expected.clamp(*clamp["clamp"]) if clamp else expected
        torch.testing.assert_close(out.x, expected)
        assert out.stats.grad_norm.shape == (n_steps + 1, B)
        assert out.key == KEY.advance(n_steps + 1)


def test_denoise_in_a_whole_chain_kernel():
    net, x0 = MLPEnergy(D).double(), normals(B, D)
    common = {"n_steps": T, "drift": DRIFT, "noise": NOISE, "denoise": [0.1, 0.2, 0.3, 0.4]}
    whole = LangevinSampler(net, kernel=True, **common)(x0, key=KEY).x
    steps = LangevinSampler(net, kernel=False, **common)(x0, key=KEY).x
    torch.testing.assert_close(whole, steps)


def test_denoise_has_the_last_level_again():
    sigma = torch.linspace(1, 0.1, 4, dtype=torch.float64)
    seen = []

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(float(sigma))
        return -x / sigma**2

    sampler = LangevinSampler(
        score=score, n_steps=4, drift=0.01, step_kwargs={"sigma": sigma}, denoise=0.01
    )
    out = sampler(normals(B, D), key=KEY).x
    assert seen == [*sigma.tolist(), float(sigma[-1])]
    torch.testing.assert_close(out, torch.zeros_like(out))  # σ_L² = 0.01: all that is left is 0
    with pytest.raises(ValueError, match="denoise has no row of step_kwargs"):
        sampler(normals(B, D), n_steps=0)


def test_bad_denoise():
    with pytest.raises(ValueError, match="denoise must be ≥ 0"):
        LangevinSampler(energy, n_steps=1, drift=0.1, denoise=-1.0)
    with pytest.raises(TypeError, match="denoise must be a number"):
        LangevinSampler(energy, n_steps=1, drift=0.1, denoise=True)
    sampler = LangevinSampler(energy, n_steps=1, drift=0.1, denoise=[0.1] * 5)
    with pytest.raises(ValueError, match="denoise has values for 5 chains"):
        sampler(normals(B, D))


@pytest.mark.parametrize("differentiable", [False, "last", True])
def test_after_step_leaves_the_states_dtype(differentiable):
    """Also with a mask in float64, as numpy's are."""
    x0, mask = normals(B, D).float(), torch.ones(B, D, dtype=torch.float64)
    sampler = LangevinSampler(
        energy, n_steps=3, drift=DRIFT, noise=NOISE, differentiable=differentiable,
        return_trajectory=True, after_step=lambda x, k: x * mask,
    )  # fmt: skip
    out = sampler(x0, key=KEY)
    assert out.x.dtype == out.trajectory.dtype == torch.float32


def test_after_step_comes_before_the_noise_of_the_next_step():
    """Also where nothing else looks at the state between the two."""
    x0, xi = normals(B, D), normals(T, B, D, seed=1)
    sampler = LangevinSampler(
        energy, n_steps=T, drift=DRIFT, noise=NOISE, after_step=on_sphere,
        noise_before_gradient=True, on_nonfinite="ignore",
    )  # fmt: skip
    expected = plain(x0, xi, after=on_sphere, noise_first=True)[-1]
    torch.testing.assert_close(sampler(x0, xi=xi).x, expected)


def test_after_step_of_something_that_is_learned():
    """Outside of a differentiable chain no gradient reaches it."""
    scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    x0 = normals(B, D)
    for after in (lambda x, step: x * scale, lambda x, step: x.mul_(scale)):
        out = LangevinSampler(
            score=lambda x: -x, n_steps=2, drift=0.5, noise=0.0, after_step=after
        )(x0)  # fmt: skip
        assert not out.x.requires_grad
        torch.testing.assert_close(out.x, x0 / 16)
