"""The options of LangevinSampler, alone and together, against a loop in plain PyTorch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext.energies import MLPEnergy
from coopflow_ext.samplers import LangevinSampler

B, D, T = 5, 6, 8


def energy(x: Tensor) -> Tensor:
    return (0.4 * x.square() + torch.sin(2 * x)).flatten(1).sum(1)


@pytest.fixture
def x0() -> Tensor:
    return torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def xi() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(T, B, D, dtype=torch.float64, generator=generator)


def plain_chain(x, xi, *, a, s, c=0.0, pull=None, grad_clip=None, grad_norm=None, step_clip=None,
                clamp=None, clamp_when="step", noise_first=False):  # fmt: skip
    """States after each step. a and s: functions of the step that broadcast against (B, 1)."""
    states = []
    for k, z in enumerate(xi):
        x = x + s(k) * z if noise_first else x
        if clamp is not None and clamp_when in ("noise", "both"):
            x = x.clamp(*clamp)
        leaf = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        if grad_clip is not None:
            g = g.clamp(-grad_clip, grad_clip)
        if grad_norm is not None:
            norm = g.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
            g = g * (grad_norm / norm).clamp(max=1)
        d = a(k) * g + a(k) * c * x
        if pull is not None:
            d = d + a(k) * pull[1] * (x - pull[0])
        if step_clip is not None:
            d = d.clamp(-step_clip, step_clip)
        x = x - d if noise_first else x - d + s(k) * z
        at_end = clamp_when == "end" and k == T - 1
        if clamp is not None and (clamp_when in ("step", "both") or at_end):
            x = x.clamp(*clamp)
        states.append(x)
    return torch.stack(states)


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


CLIPS = [{}, {"grad_clip": 0.5}, {"grad_norm": 1.0}, {"step_clip": 0.05},
         {"grad_clip": 0.7, "grad_norm": 1.2, "step_clip": 0.04}]  # fmt: skip
CLAMPS = [{}, {"clamp": (-0.5, 0.6)}, {"clamp": (-0.5, 0.6), "clamp_when": "end"}]
NOISE_CLAMPS = [{"clamp": (-0.5, 0.6), "clamp_when": when} for when in ("noise", "both")]


@pytest.mark.parametrize("noise_first", [False, True])
@pytest.mark.parametrize("on_nonfinite", ["raise", "ignore"])
def test_options_together(x0, xi, noise_first, on_nonfinite):
    """Every pairing of clips and clamps, with reference, pull, thinning, stats and trajectory."""
    x_ref = x0.flip(0)
    clamps = [*CLAMPS, *(NOISE_CLAMPS if noise_first else [])]
    for clips, clamp, extra in itertools.product(CLIPS, clamps, [False, True]):
        options = {**clips, **clamp}
        sampler = LangevinSampler(
            energy, n_steps=T, drift=0.1, noise=0.2, noise_before_gradient=noise_first,
            on_nonfinite=on_nonfinite, return_trajectory=extra, thin=3 if extra else 1,
            stats=extra, reference_std=2.0 if extra else None,
            pull=(x_ref, 0.3) if extra else None, **options,
        )  # fmt: skip
        out = sampler(x0, xi=xi)
        expected = plain_chain(
            x0, xi, a=lambda k: 0.1, s=lambda k: 0.2, c=0.25 if extra else 0.0,
            pull=(x_ref, 0.3) if extra else None, noise_first=noise_first, **options,
        )  # fmt: skip
        assert_same(out.x, expected[-1])
        if extra:
            assert out.trajectory.shape == (T // 3, B, D)
            assert_same(out.trajectory, expected[2::3])
            assert out.stats.grad_norm.shape == (T, B)
        else:
            assert out.trajectory is None
            assert out.stats is None


EVERY_STEP = {
    "nothing": {},
    "every limit": {"grad_clip": 1.2, "grad_norm": 2.0, "step_clip": 0.3, "clamp": (-1.0, 1.5)},
    "decay, freeze": {"reference_std": 0.7, "on_nonfinite": "freeze"},
    "no mask": {"on_nonfinite": "ignore", "temperature": 0.5},
    "tables": {"temperature": torch.linspace(0.5, 1.0, T)},
    "pull": {"pull": (torch.zeros(16, 5), 0.1)},
    "statistics": {"stats": True},
    "noise first": {"noise_before_gradient": True, "on_nonfinite": "ignore"},
    "noise first, clamped": {"noise_before_gradient": True, "clamp": (-1.0, 1.0)},
    "clamp at the end": {"clamp": (-1.0, 1.0), "clamp_when": "end"},
    "autocast": {"autocast": torch.bfloat16},
}


@pytest.mark.parametrize("name", EVERY_STEP)
@pytest.mark.parametrize("kind", ["energy", "score"])
def test_the_bound_steps_of_a_chain_are_steps_of_the_face(monkeypatch, name, kind):
    """Also one call of an op for each step, whatever the options."""
    options = {"n_steps": T, "step_size": 0.4, **EVERY_STEP[name]}
    breaks_at = 1.5 if "on_nonfinite" in options else math.inf

    def score(x):
        return torch.where(x > breaks_at, math.nan, 1.0) * -(x + x.sin())

    def energy(x):
        return (torch.where(x > breaks_at, math.nan, 1.0) * (0.5 * x * x - x.cos())).sum(1)

    sampler = LangevinSampler(**{kind: {"energy": energy, "score": score}[kind]}, **options)
    x0, xi = cf.ops.normal((16, 5), cf.Key(5).tensor()), torch.randn(T, 16, 5)
    called: list[int] = []

    def by_the_face(self, x, rng, **replaced):
        def move(grad, step):
            called.append(step)
            cf.ops.langevin_step_(x, grad, rng, **self.at(step, **replaced))

        return move

    for noise in ({"key": cf.Key(6)}, {"xi": xi}):
        ours = sampler(x0, **noise)
        with monkeypatch.context() as patched:
            patched.setattr(cf.ops.BoundStep, "in_place", by_the_face)
            called.clear()
            expected = sampler(x0, **noise)
        assert called == list(range(T))
        assert ours.x.isnan().any() == (options.get("on_nonfinite") == "ignore")
        assert torch.equal(ours.x.nan_to_num(9.0), expected.x.nan_to_num(9.0))
        assert not torch.equal(ours.x, x0)
        if ours.stats is not None:
            kept, told = vars(ours.stats), vars(expected.stats)
            torch.testing.assert_close(kept, told, rtol=0, atol=0, equal_nan=True)


def test_schedules_in_every_form(x0, xi):
    values = torch.linspace(0.02, 0.2, T, dtype=torch.float64)
    chains = torch.linspace(0.5, 1.5, B, dtype=torch.float64)
    expected = plain_chain(
        x0, xi, a=lambda k: values[k], s=lambda k: values[k].sqrt() * chains[:, None]
    )[-1]
    noise = values.sqrt()[:, None] * chains
    forms = [values, values.tolist(), values[:, None], lambda k: float(values[k]),
             lambda k: values[k], values[:, None].expand(T, B)]  # fmt: skip
    for drift in forms:
        out = LangevinSampler(energy, n_steps=T, drift=drift, noise=noise)(x0, xi=xi)
        assert_same(out.x, expected)
    out = LangevinSampler(
        energy, n_steps=T, drift=values, noise=lambda k: values[k].sqrt() * chains
    )(x0, xi=xi)
    assert_same(out.x, expected)


def test_temperature_scales_the_noise_only(x0, xi):
    tau = torch.linspace(0, 1, T, dtype=torch.float64)
    delta = 0.3
    expected = plain_chain(x0, xi, a=lambda k: delta**2 / 2, s=lambda k: delta * math.sqrt(tau[k]))[
        -1
    ]
    step = LangevinSampler(energy, n_steps=T, step_size=delta, temperature=tau)
    drift = LangevinSampler(energy, n_steps=T, drift=delta**2 / 2, temperature=tau)
    assert_same(step(x0, xi=xi).x, expected)
    assert_same(drift(x0, xi=xi).x, expected)


def test_pull_with_a_strength_per_chain_and_its_centre_at_the_call(x0, xi):
    strength = torch.linspace(0, 2, B, dtype=torch.float64)
    expected = plain_chain(
        x0, xi, a=lambda k: 0.1, s=lambda k: 0.0, pull=(x0 + 1, strength[:, None])
    )[-1]
    sampler = LangevinSampler(energy, n_steps=T, drift=0.1, noise=0.0, pull=(None, strength))
    assert_same(sampler(x0, xi=xi, x_ref=x0 + 1).x, expected)


def test_statistics_against_their_definitions(x0, xi):
    kwargs = {"grad_clip": 0.8, "clamp": (-1.0, 1.0)}
    states = plain_chain(x0, xi, a=lambda k: 0.1, s=lambda k: 0.2, **kwargs)
    starts = torch.cat([x0[None], states[:-1]])
    stats = LangevinSampler(energy, n_steps=T, drift=0.1, noise=0.2, stats=True, **kwargs)(
        x0, xi=xi
    ).stats
    grads = (0.8 * starts + 2 * torch.cos(2 * starts)).clone()
    unclamped = starts - 0.1 * grads.clamp(-0.8, 0.8) + 0.2 * xi
    assert_same(stats.energy, torch.stack([energy(x) for x in starts]))
    assert_same(stats.grad_norm, grads.norm(dim=2))
    assert_same(stats.displacement, (states - starts).norm(dim=2))
    assert_same(stats.clip_fraction, (grads.abs() > 0.8).double().mean(2))
    assert_same(stats.clamp_fraction, (unclamped.abs() > 1).double().mean(2))
    assert not stats.nonfinite.any()
    negative = LangevinSampler(
        lambda x: -energy(x), n_steps=T, drift=0.1, noise=0.2, stats=True, negative_energy=True,
        **kwargs,
    )  # fmt: skip
    assert_same(negative(x0, xi=xi).stats.energy, stats.energy)
    score = LangevinSampler(score=lambda x: -x, n_steps=2, step_size=0.1, stats=True)
    assert score(x0).stats.energy is None


def test_statistics_do_not_see_pending_noise(x0, xi):
    out = LangevinSampler(
        energy, n_steps=T, drift=0.1, noise=5.0, noise_before_gradient=True, stats=True,
        return_trajectory=True, on_nonfinite="ignore",
    )(x0, xi=xi)  # fmt: skip
    points = torch.cat([x0[None], out.trajectory[:-1]]) + 5.0 * xi
    assert_same(out.stats.displacement, (out.trajectory - points).norm(dim=2))


@pytest.mark.parametrize("clamp_when", ["noise", "both"])
def test_statistics_do_not_see_the_clamp_after_the_noise(x0, xi, clamp_when):
    out = LangevinSampler(
        energy, n_steps=T, drift=0.1, noise=5.0, noise_before_gradient=True, stats=True,
        return_trajectory=True, clamp=(-1, 0.9), clamp_when=clamp_when, negative_energy=True,
    )(x0, xi=xi)  # fmt: skip
    before = torch.cat([x0[None], out.trajectory[:-1]])
    points = (before + 5.0 * xi).clamp(-1, 0.9)
    assert ((before + 5.0 * xi) != points).double().mean() > 0.5
    assert_same(out.stats.displacement, (out.trajectory - points).norm(dim=2))
    grads = torch.stack([torch.func.grad(lambda x: energy(x).sum())(p) for p in points])
    moved = points + 0.1 * grads  # up the energy, across the bounds
    share = (moved != moved.clamp(-1, 0.9)).double().mean(2)
    assert share.mean() > 0.5
    assert_same(out.stats.clamp_fraction, share if clamp_when == "both" else 0 * share)


def test_a_state_of_several_tensors_is_one_chain(x0, xi):
    """Equal to the chain of the concatenated state: clips by norm and masks act jointly."""
    split = (x0[:, :2].contiguous(), x0[:, 2:].reshape(B, 2, 2))
    noise = (xi[..., :2].contiguous(), xi[..., 2:].reshape(T, B, 2, 2))
    options = {"n_steps": T, "drift": 0.1, "noise": 0.2, "grad_clip": 1.5, "grad_norm": 1.0,
               "stats": True, "return_trajectory": True}  # fmt: skip

    def split_energy(state):
        return energy(torch.cat([state[0], state[1].flatten(1)], dim=1))

    whole = LangevinSampler(energy, **options)(x0, xi=xi)
    for structure in (list, tuple):
        out = LangevinSampler(split_energy, **options)(structure(split), xi=noise)
        assert isinstance(out.x, structure)
        assert_same(torch.cat([out.x[0], out.x[1].flatten(1)], dim=1), whole.x)
        joined = torch.cat([out.trajectory[0], out.trajectory[1].flatten(2)], dim=2)
        assert_same(joined, whole.trajectory)
        for name in ("energy", "grad_norm", "displacement", "clip_fraction", "clamp_fraction"):
            assert_same(getattr(out.stats, name), getattr(whole.stats, name))


def test_tensors_of_a_state_have_their_own_noise():
    key = cf.Key(5)
    x = torch.zeros(4, 3)
    out = LangevinSampler(lambda s: 0 * (s[0] + s[1]).sum(1), n_steps=1, drift=0.0, noise=1.0)(
        [x, x], key=key
    )
    assert torch.equal(out.x[0], cf.ops.normal((4, 3), key.tensor()))
    assert torch.equal(out.x[1], cf.ops.normal((4, 3), key.fold_in(1).tensor()))


def test_model_kwargs_reach_the_energy_and_the_score(x0):
    def conditional(x, centre):
        return 0.5 * (x - centre).square().sum(1)

    options = {"n_steps": 3, "step_size": 0.1}
    kwargs = {"centre": 2.0}
    a = LangevinSampler(conditional, **options)(x0, key=cf.Key(0), model_kwargs=kwargs)
    b = LangevinSampler(score=lambda x, centre: centre - x, **options)(
        x0, key=cf.Key(0), model_kwargs=kwargs
    )
    assert_same(a.x, b.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype):
    x0 = torch.randn(4, 3).to(dtype)
    out = LangevinSampler(energy, n_steps=3, step_size=0.1, return_trajectory=True)(x0)
    assert out.x.dtype == out.trajectory.dtype == dtype


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches(batch):
    out = LangevinSampler(
        energy, n_steps=3, step_size=0.1, stats=True, return_trajectory=True, on_nonfinite="raise"
    )(torch.randn(batch, 3))
    assert out.x.shape == (batch, 3)
    assert out.stats.grad_norm.shape == (3, batch)
    assert out.trajectory.shape == (3, batch, 3)


def test_no_steps_give_x0_back(x0):
    key = cf.Key(0)
    out = LangevinSampler(energy, n_steps=0, step_size=0.1, noise_before_gradient=True)(x0, key=key)
    assert torch.equal(out.x, x0)
    assert out.x is not x0
    assert out.key == key


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 2, 4, 4)])
def test_strided_starts(shape):
    """A start that is not dense, or whose batch is not outermost, gives the same chain."""
    dense = torch.randn(shape)
    sampler = LangevinSampler(energy, n_steps=3, step_size=0.1)
    expected = sampler(dense, key=cf.Key(1)).x
    spread = torch.zeros(*shape, 2)
    spread[..., 0] = dense
    assert torch.equal(sampler(spread[..., 0], key=cf.Key(1)).x, expected)
    turned = dense.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(sampler(turned, key=cf.Key(1)).x, expected)


def test_gradient_in_another_memory_layout():
    """Networks may return a channels_last gradient for a contiguous x."""
    x0 = torch.randn(3, 2, 4, 4)

    def score(x):
        return -x.contiguous(memory_format=torch.channels_last)

    a = LangevinSampler(score=score, n_steps=3, step_size=0.1)(x0, key=cf.Key(1))
    b = LangevinSampler(score=lambda x: -x, n_steps=3, step_size=0.1)(x0, key=cf.Key(1))
    assert torch.equal(a.x, b.x)


def test_runs_under_no_grad_and_inference_mode():
    net = MLPEnergy(3)
    x0, sampler = torch.randn(4, 3), LangevinSampler(net, n_steps=3, step_size=0.1)
    expected = sampler(x0, key=cf.Key(0)).x
    with torch.no_grad():
        assert torch.equal(sampler(x0, key=cf.Key(0)).x, expected)
    with torch.inference_mode():
        assert torch.equal(sampler(x0 + 0, key=cf.Key(0)).x, expected)


def test_key_none_follows_torchs_seed(x0):
    sampler = LangevinSampler(energy, n_steps=3, step_size=0.1)
    torch.manual_seed(1)
    a, b = sampler(x0), sampler(x0)
    torch.manual_seed(1)
    assert torch.equal(sampler(x0).x, a.x)
    assert not torch.equal(a.x, b.x)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_the_norm_of_several_tensors_is_right_whatever_its_size(size):
    """Their joint norm, where float32's squares would vanish or overflow."""
    x0 = [torch.ones(3, 2), 2 * torch.ones(3, 4)]

    def score(state):
        return [-x for x in state]

    limit = 0.5 * size
    sampler = LangevinSampler(score=score, n_steps=1, drift=1.0, noise=0.0, grad_norm=limit)
    moved = sampler([size * x for x in x0], key=cf.Key(1)).x
    norm = math.sqrt(2 + 4 * 4) * size
    for x, y in zip(x0, moved, strict=True):
        expected = size * x - size * x * min(1.0, limit / norm)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_norm_clip_of_whole_chains_is_right_whatever_its_size(kernel, size):
    energy = cf.energies.GaussianEnergy(torch.zeros(2), torch.eye(2) / size)
    x0 = torch.tensor([[0.3, 0.4], [3e-3, 4e-3]])
    sampler = LangevinSampler(
        energy, n_steps=1, drift=1.0, noise=0.0, grad_norm=0.05 * size, kernel=kernel
    )
    moved = sampler(x0, key=cf.Key(1)).x
    scale = torch.tensor([0.1, 1.0])[:, None]  # ‖grad‖ = size·(0.5, 0.005)
    torch.testing.assert_close(x0 - moved, x0 * size * scale, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"autocast": torch.bfloat16}, {"noise_before_gradient": True}]
)
def test_a_score_may_hand_out_the_state_itself(options):
    """All of its tensors are read before the first of them moves."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 3, generator=generator) for _ in range(2)]
    common = {"n_steps": 3, "step_size": 0.5, **options}
    itself = LangevinSampler(score=lambda s: (s[1], s[0]), **common)(start, key=cf.Key(1)).x
    copies = LangevinSampler(score=lambda s: (s[1].clone(), s[0].clone()), **common)
    assert all(map(torch.equal, itself, copies(start, key=cf.Key(1)).x))
    assert not torch.equal(itself[0], start[0])


def test_a_score_in_another_half_precision():
    """The op takes either beside a wider state, and beside its own dtype alone."""
    start = torch.linspace(-1, 1, 12).reshape(4, 3).half()
    common = {"n_steps": 3, "drift": 0.25, "noise": 0.0}
    other = LangevinSampler(score=lambda x: -x.bfloat16(), **common)(start).x
    own = LangevinSampler(score=lambda x: -x.bfloat16().half(), **common)(start).x
    assert other.dtype == torch.float16
    assert torch.equal(other, own)
