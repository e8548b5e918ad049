"""Every preset against its equation, in plain PyTorch with supplied normals."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from coopflow_ext import Key, presets
from coopflow_ext.energies import MLPEnergy

B, D, T = 6, 4, 20


def smooth_energy(x: Tensor) -> Tensor:
    """Not quadratic, with gradients of order one."""
    return (0.3 * x.square() + torch.sin(2 * x)).sum(1)


def energy_in_bounds(x: Tensor) -> Tensor:
    """With its minimum at 0.51, so that chains clamped to [0, 1] do not end on the bounds."""
    return smooth_energy(x - 1.2)


def gradient(x: Tensor, energy=smooth_energy) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(energy(leaf).sum(), leaf)[0]


@pytest.fixture
def x0() -> Tensor:
    return torch.rand(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def xi() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(T, B, D, dtype=torch.float64, generator=generator)


def check(sampler, x0: Tensor, xi: Tensor, step, **call) -> None:
    """``step(x, k, ξ)`` repeated T times equals the sampler, to rounding in float64."""
    x = x0
    for k in range(T):
        x = step(x, k, xi[k])
    torch.testing.assert_close(sampler(x0, xi=xi, **call).x, x, rtol=1e-10, atol=1e-12)
    assert x.unique().numel() > x.numel() // 2  # or clamps would hide what the steps did


def test_coopflow(x0, xi):
    def step(x, k, z):
        d = (0.5 * 0.3**2 * gradient(x)).clamp(-0.1, 0.1)
        return (x - d).clamp(-1, 1)

    check(presets.coopflow(smooth_energy, step_size=0.3, n_steps=T), x0, xi, step)


def test_coopflows_bounds_are_those_of_its_steps_and_of_its_images(x0):
    """From beyond both bounds, by steps of which many are longer than the longest."""
    x0 = 2.6 * x0 - 1.3

    def free(x):
        return 0.5 * 0.6**2 * gradient(x)

    assert ((0.11 < free(x0).abs()) & (free(x0).abs() < 0.15)).any()
    assert (x0 + 0.1 < -1).any()
    assert (x0 - 0.1 > 1).any()

    def step(x):
        return (x - free(x).clamp(-0.1, 0.1)).clamp(-1, 1)

    ours = presets.coopflow(smooth_energy, step_size=0.6, n_steps=2)(x0).x
    torch.testing.assert_close(ours, step(step(x0)), rtol=1e-10, atol=1e-12)


def test_coopnets(x0, xi):
    def step(x, k, z):
        return x - 0.5 * 0.002**2 * (gradient(x) + x / 0.016**2) + 0.002 * z

    check(presets.coopnets(smooth_energy, n_steps=T), x0, xi, step)


def test_coopvaebm(x0, xi):
    def step(x, k, z):
        return x - 0.5 * 0.002**2 * (gradient(x) + x / 0.016**2)

    check(presets.coopvaebm(smooth_energy, n_steps=T), x0, xi, step)


@pytest.mark.parametrize("preset", [presets.short_run, presets.jem])
def test_short_run_and_jem(preset, x0, xi):
    def energy(x):  # curvature below 2, or the map x − ∇U would be chaotic
        return 0.2 * smooth_energy(x)

    def step(x, k, z):
        return x - gradient(x, energy) + 0.01 * z

    check(preset(energy, n_steps=T), x0, xi, step)


@pytest.mark.parametrize("m", [None, 1e-3])
def test_life_cycle(m, x0, xi):
    eps, tau = 0.005, 1e-4

    def step(x, k, z):
        g = gradient(x) / tau
        if m is not None:
            norm = g.norm(dim=1, keepdim=True)
            g = g * (m / (0.5 * eps**2) / norm).clamp(max=1)
        return x - 0.5 * eps**2 * g + eps * z

    check(presets.life_cycle(smooth_energy, n_steps=T, max_step_norm=m), x0, xi, step)


def test_hat_ebm(x0, xi):
    eps, tau, m = 5e-4, 1e-8, 2.5
    slope = torch.linspace(0, 0.5, B, dtype=torch.float64)

    def energy(x):  # the norm's limit acts on some chains
        return 0.02 * smooth_energy(x) + slope * x.sum(1)

    def step(x, k, z):
        g = gradient(x, energy) / tau
        norm = g.norm(dim=1, keepdim=True)
        g = g * (m / (0.5 * eps**2) / norm).clamp(max=1)
        return x - 0.5 * eps**2 * g + eps * z

    check(presets.hat_ebm(energy, n_steps=T), x0, xi, step)


def test_igebm(x0, xi):
    def energy(x):
        return 0.01 * energy_in_bounds(x)

    def step(x, k, z):
        x = x + 0.005 * z
        return (x - 10 * gradient(x, energy).clamp(-0.01, 0.01)).clamp(0, 1)

    check(presets.igebm(energy, n_steps=T), x0, xi, step)
    check(presets.igebm(energy, n_steps=T, on_nonfinite="ignore"), x0, xi, step)


def test_uvadlc(x0, xi):
    """From starts beyond the bounds, so that the clamp after the noise changes the gradient."""
    start = 2.4 * x0 - 1.2

    def energy(x):
        return 0.02 * smooth_energy(x - 0.5)

    def step(x, k, z):
        x = (x + 0.005 * z).clamp(-1, 1)
        return (x - 10 * gradient(x, energy).clamp(-0.03, 0.03)).clamp(-1, 1)

    check(presets.uvadlc(energy, n_steps=T), start, xi, step)
    check(presets.uvadlc(energy, n_steps=T, on_nonfinite="ignore"), start, xi, step)
    network = presets.uvadlc(lambda x: -energy(x), n_steps=T, negative_energy=True)
    check(network, start, xi, step)


@pytest.mark.parametrize(
    ("name", "drift", "clip", "low"),
    [
        ("igebm", 10.0, 0.01, 0.0),
        ("uvadlc", 10.0, 0.03, -1.0),
        ("improved_cd", 100.0, math.inf, 0.0),
        ("clel", 100.0, math.inf, 0.0),
    ],
)
def test_bounds_of_gradients_and_of_images(name, drift, clip, low):
    """One step from everywhere, also from beyond the images' bounds."""
    x0 = torch.linspace(low - 0.5, 1.5, 4001, dtype=torch.float64)[:, None]
    g = gradient(x0, energy_in_bounds)
    assert clip == math.inf or ((clip < g) & (g < 1.2 * clip)).any()
    x = x0.clamp(low, 1) if name == "uvadlc" else x0
    g = gradient(x, energy_in_bounds).clamp(-clip, clip)
    out = getattr(presets, name)(energy_in_bounds, n_steps=1, noise=0.0)(x0)
    torch.testing.assert_close(out.x, (x - drift * g).clamp(low, 1), rtol=1e-10, atol=1e-12)
    assert not out.x.requires_grad


@pytest.mark.parametrize("decay_noise", [False, True])
def test_improved_cd(decay_noise, x0, xi):
    def energy(x):
        return 0.002 * energy_in_bounds(x)

    def step(x, k, z):
        d_k = (T - k - 1) / T if decay_noise else 1.0
        x = x + 0.001 * d_k * z
        return (x - 100 * gradient(x, energy)).clamp(0, 1)

    check(presets.improved_cd(energy, n_steps=T, decay_noise=decay_noise), x0, xi, step)


def test_improved_cd_last_step_is_differentiable(x0, xi):
    """The KL term's gradient: through the last step only, with its x taken as a constant."""
    torch.manual_seed(0)
    net = MLPEnergy(D, widths=(8,)).double()

    def energy(x):  # so flat that the last step ends on no bound
        return 0.001 * net(x)

    sampler = presets.improved_cd(energy, n_steps=T, differentiable_last=True)
    parameters = list(net.parameters())
    end = sampler(x0, xi=xi).x
    got = torch.autograd.grad(end.square().sum(), parameters, allow_unused=True)

    x = x0
    for k in range(T):
        x = (x + 0.001 * xi[k]).detach().requires_grad_()
        last = k == T - 1
        (g,) = torch.autograd.grad(energy(x).sum(), x, create_graph=last)
        x = (x - 100 * g).clamp(0, 1)
    torch.testing.assert_close(end, x, rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(x.square().sum(), parameters, allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in got) >= 3
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_clel(x0, xi):
    def energy(x):
        return 0.002 * energy_in_bounds(x)

    def step(x, k, z):
        return (x - 100 * gradient(x, energy) + 0.001 * z).clamp(0, 1)

    check(presets.clel(energy, n_steps=T), x0, xi, step)


def test_vaebm_moves_every_tensor_of_the_state(x0, xi):
    eta = 0.02

    def energy(state):
        x, z = state
        return smooth_energy(x) + (x.mean(1, keepdim=True) * z).square().sum(1)

    z0, zeta = x0[:, :3] - 0.5, xi.flip(0)[..., :3]
    x, z = x0, z0
    for k in range(T):
        x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
        gx, gz = torch.autograd.grad(energy((x, z)).sum(), (x, z))
        x = x - 0.5 * eta * gx + eta**0.5 * xi[k]
        z = z - 0.5 * eta * gz + eta**0.5 * zeta[k]
    out = presets.vaebm(energy, n_steps=T, step_size=eta)((x0, z0), xi=(xi, zeta))
    assert isinstance(out.x, tuple)
    torch.testing.assert_close(out.x, (x, z), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1.0, 0.99])
@pytest.mark.parametrize("last", [(), (0,), (1, 2)])
def test_drl_with_values_per_chain(n, last, x0, xi):
    s = torch.linspace(0.05, 0.3, B, dtype=torch.float64)
    sigma = torch.linspace(0.2, 1.0, B, dtype=torch.float64)
    x_ref = x0.flip(0)
    col = (slice(None), None)
    is_final = torch.zeros(B, dtype=torch.bool)
    is_final[list(last)] = True

    def step(x, k, z):
        pull = (x - x_ref) / sigma[col] ** 2
        pulled = gradient(x) + pull.masked_fill(is_final[col], 0)
        return x - 0.5 * s[col] ** 2 * pulled + n * s[col] * z

    sampler = presets.drl(
        smooth_energy, n_steps=T, step_size=s[None], pull_std=sigma, noise_scale=n,
        is_final=is_final if last else None,
    )  # fmt: skip
    check(sampler, x0, xi, step, x_ref=x_ref)


def test_drl_of_two_chains_with_little_noise(x0, xi):
    x0, xi, ref = x0[:2], xi[:, :2], x0[2:4]
    sigma = torch.tensor([0.5, 0.8], dtype=torch.float64)

    def step(x, k, z):
        g = gradient(x) + (x - ref) / sigma[:, None] ** 2
        return x - 0.5 * 0.1**2 * g + 0.3 * 0.1 * z

    sampler = presets.drl(smooth_energy, step_size=0.1, pull_std=sigma, noise_scale=0.3, n_steps=T)
    check(sampler, x0, xi, step, x_ref=ref)


def test_drl_at_its_last_level_has_no_pull(x0, xi):
    sampler = presets.drl(
        smooth_energy, n_steps=T, step_size=0.2, pull_std=0.5, is_final=torch.ones(B).bool()
    )
    check(sampler, x0, xi, lambda x, k, z: x - 0.02 * gradient(x) + 0.2 * z, x_ref=x0.flip(0))


def test_ula(x0, xi):
    eta, tau = 0.05, 0.3

    def step(x, k, z):
        return x - eta * gradient(x) + (2 * eta * tau) ** 0.5 * z

    check(presets.ula(smooth_energy, n_steps=T, step_size=eta, temperature=tau), x0, xi, step)


def test_overrides_replace_the_loops_own_options(x0, xi):
    def step(x, k, z):
        d = (0.5 * 0.3**2 * gradient(x)).clamp(-0.02, 0.02)
        return x - d + 0.1 * z

    sampler = presets.coopflow(
        smooth_energy, step_size=0.3, n_steps=T, step_clip=0.02, clamp=None, noise=0.1
    )
    check(sampler, x0, xi, step)

    def quiet(x, k, z):
        return x - 0.5 * 0.2**2 * (gradient(x) + x / 0.5**2)

    sampler = presets.coopnets(
        smooth_energy, step_size=0.2, reference_std=0.5, n_steps=T, noise=0.0
    )
    check(sampler, x0, xi, quiet)


def test_a_step_size_replaces_the_drift_and_noise_of_a_loop_without_that_letter(x0, xi):
    def step(x, k, z):
        return x - 0.5 * 0.2**2 * gradient(x) + 0.2 * z

    for preset in (presets.jem, presets.short_run):
        check(preset(smooth_energy, n_steps=T, step_size=0.2), x0, xi, step)


LETTERS = {
    "coopflow": {"step_size": 0.1},
    "coopnets": {"step_size": 0.004, "reference_std": 0.3},
    "coopvaebm": {"step_size": 0.004, "reference_std": 0.3},
    "life_cycle": {"step_size": 0.01, "energy_temperature": 1e-3, "max_step_norm": 1e-4},
    "hat_ebm": {"step_size": 1e-3, "energy_temperature": 1e-6, "max_step_norm": 1e-4},
    "improved_cd": {"decay_noise": True, "differentiable_last": True},
    "vaebm": {"step_size": 0.01},
    "drl": {"step_size": 0.2, "pull_std": 0.5, "noise_scale": 0.5},
    "ula": {"step_size": 0.1, "temperature": 0.3},
}
KNOW_THEIR_STEP = {
    "cdrl", "energy_matching", "eqm", "lebm_posterior", "lebm_prior", "ncsn", "ncsnv2",
    "score_sde_corrector",
}  # fmt: skip
"""Those of test_presets_annealed.py."""
REQUIRED = {
    "drl": {"step_size": 0.1, "pull_std": 1.0},
    "ula": {"step_size": 0.05, "temperature": 1.0},
}


@pytest.mark.parametrize(
    ("name", "letter"), [(name, letter) for name, letters in LETTERS.items() for letter in letters]
)
def test_every_letter_has_an_effect(name, letter, x0, xi):
    """What each does is tested above; here, that no name of one is dropped."""

    def end(**options):
        sampler = getattr(presets, name)(
            lambda x: 0.002 * energy_in_bounds(x),
            n_steps=T,
            **{**REQUIRED.get(name, {}), **options},
        )
        return sampler(x0, xi=xi, **({"x_ref": x0.flip(0)} if name == "drl" else {})).x

    x, other = end(), end(**{letter: LETTERS[name][letter]})
    if letter == "differentiable_last":
        assert torch.equal(x, other)
        assert other.grad_fn is not None
    else:
        assert not torch.equal(x, other)


def test_defaults_are_those_of_the_table():
    steps = {"coopflow": 30, "coopnets": 15, "coopvaebm": 15, "short_run": 100, "life_cycle": 100,
             "hat_ebm": 50, "igebm": 60, "uvadlc": 60, "improved_cd": 40, "clel": 60,
             "jem": 20, "vaebm": 10}  # fmt: skip
    for name, n_steps in steps.items():
        assert getattr(presets, name)(smooth_energy).plan.n_steps == n_steps
    assert presets.coopflow(smooth_energy).plan.coefficients["drift"] == pytest.approx(0.03**2 / 2)
    assert presets.vaebm(smooth_energy).plan.coefficients["noise"] == pytest.approx(8e-5**0.5)
    assert presets.drl(smooth_energy, step_size=0.1, pull_std=1.0).plan.n_steps == 30
    assert set(presets.__all__) == {*steps, "drl", "ula", *KNOW_THEIR_STEP}


def test_required_letters_and_wrong_values():
    with pytest.raises(TypeError, match="temperature"):
        presets.ula(smooth_energy, n_steps=3, step_size=0.1)
    with pytest.raises(TypeError, match="pull_std"):
        presets.drl(smooth_energy, step_size=0.1)
    with pytest.raises(TypeError, match="step_size"):
        presets.drl(smooth_energy, pull_std=0.1)
    with pytest.raises(TypeError, match="step_size"):
        presets.ula(smooth_energy, n_steps=3, temperature=1.0)
    with pytest.raises(TypeError, match="n_steps"):
        presets.ula(smooth_energy, step_size=0.1, temperature=1.0)
    with pytest.raises(TypeError, match="decay_noise must be True or False"):
        presets.improved_cd(smooth_energy, decay_noise=0.5)
    with pytest.raises(ValueError, match="differentiable_last and differentiable"):
        presets.improved_cd(smooth_energy, differentiable_last=True, differentiable=True)
    with pytest.raises(TypeError, match="max_step_norm"):
        presets.jem(smooth_energy, max_step_norm=1.0)
    with pytest.raises(ValueError, match="pull_std"):
        presets.drl(smooth_energy, step_size=0.1, pull_std=0.0)
    with pytest.raises(ValueError, match="pull_std"):
        presets.drl(smooth_energy, step_size=0.1, pull_std=torch.tensor([0.1, 0.0]))
    with pytest.raises(ValueError, match="max_step_norm"):
        presets.life_cycle(smooth_energy, step_size=lambda k: 0.1, max_step_norm=1.0)
    with pytest.raises(ValueError, match="max_step_norm needs a constant step_size > 0"):
        presets.life_cycle(smooth_energy, step_size=0.0, max_step_norm=1.0)
    with pytest.raises(ValueError, match="max_step_norm"):
        presets.life_cycle(smooth_energy, max_step_norm=0.0)
    with pytest.raises(ValueError, match="energy_temperature"):
        presets.life_cycle(smooth_energy, energy_temperature=0.0)
    with pytest.raises(ValueError, match="temperature and noise"):
        presets.jem(smooth_energy, temperature=0.5)
    with pytest.raises(ValueError, match="x_ref"):
        presets.drl(smooth_energy, step_size=0.1, pull_std=1.0)(torch.zeros(2, 3))


def test_improved_cd_of_no_steps(x0):
    out = presets.improved_cd(smooth_energy, n_steps=0, decay_noise=True)(x0, key=Key(0))
    assert torch.equal(out.x, x0)


# As each docstring's source has them.
PUBLISHED = {
    "cdrl": {"n_steps": 15, "network_scale": 1.0},
    "clel": {"n_steps": 60},
    "coopflow": {"n_steps": 30, "step_size": 0.03},
    "coopnets": {"n_steps": 15, "step_size": 0.002, "reference_std": 0.016},
    "coopvaebm": {"n_steps": 15, "step_size": 0.002, "reference_std": 0.016},
    "drl": {"n_steps": 30, "noise_scale": 1.0},
    "energy_matching": {"time_cutoff": 1.0, "n_steps": 150, "step_size": 0.01},
    "eqm": {"n_steps": 249, "step_size": 0.0017},
    "hat_ebm": {"n_steps": 50, "step_size": 5e-4, "energy_temperature": 1e-8, "max_step_norm": 2.5},
    "igebm": {"n_steps": 60},
    "improved_cd": {
        "n_steps": 40, "decay_noise": False, "differentiable_last": False, "noise": 1e-3,
    },
    "jem": {"n_steps": 20},
    "lebm_posterior": {
        "n_steps": 20, "step_size": 0.1, "reference_std": 1.0, "likelihood_std": 0.3,
    },
    "lebm_prior": {"n_steps": 60, "step_size": 0.4, "reference_std": 1.0},
    "life_cycle": {"n_steps": 100, "step_size": 0.005, "energy_temperature": 1e-4},
    "ncsn": {"n_steps_each": 100, "step_lr": 2e-5},
    "ncsnv2": {"n_steps_each": 200, "step_lr": 8e-6},
    "score_sde_corrector": {"n_steps": 1, "snr": 0.16, "alpha": 1.0},
    "short_run": {"n_steps": 100},
    "ula": {},
    "uvadlc": {"n_steps": 60},
    "vaebm": {"n_steps": 10, "step_size": 8e-5},
}  # fmt: skip


def test_defaults_are_the_published_numbers() -> None:
    found = {}
    for name, function in inspect.getmembers(presets, inspect.isfunction):
        if function.__module__ == presets.__name__ and not name.startswith("_"):
            defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()}
            found[name] = {n: v for n, v in defaults.items() if isinstance(v, (bool, int, float))}
    assert found == PUBLISHED
