"""Steps whose size, noise or direction the coefficients alone do not give: snr, preconditioner,
momentum; against loops in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from test_sampler_graph import recorded  # noqa: F401
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext.energies import MLPEnergy
from coopflow_ext.samplers import LangevinSampler

T, B, D = 21, 4, 3
KEY = cf.Key(5)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def energy(x: Tensor) -> Tensor:
    return (0.4 * x.square() + torch.sin(2 * x)).sum(1)


def gradient(x: Tensor, function=energy) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@pytest.fixture(params=[False, True])
def captured(request) -> bool:
    if request.param:
        request.getfixturevalue("recorded")
    return request.param


@pytest.mark.parametrize("over", ["chain", "batch"])
@pytest.mark.parametrize("snr", [0.16, torch.linspace(0.3, 0.1, T), torch.rand(1, B) / 4])
def test_snr(captured, over, snr):
    x0, xi = normals(B, D), normals(T, B, D, seed=1)
    x = x0
    for k, z in enumerate(xi):
        g, r = -gradient(x), snr if isinstance(snr, float) else snr.double().reshape(-1)
        r = r[k] if isinstance(snr, Tensor) and snr.ndim == 1 else r
        norms = g.norm(dim=1), z.norm(dim=1)
        if over == "batch":
            norms = norms[0].mean(), norms[1].mean()
        step_size = ((r * norms[1] / norms[0]) ** 2 * 2 * torch.ones(B)).double()
        x = x + step_size[:, None] * g + (2 * step_size).sqrt()[:, None] * z
    sampler = LangevinSampler(energy, n_steps=T, snr=snr, snr_over=over)
    torch.testing.assert_close(sampler(x0, xi=xi).x, x)


def test_snr_from_the_key_is_that_of_its_normals(captured):
    x0 = normals(B, D).float()
    sampler = LangevinSampler(energy, n_steps=T, snr=0.2)
    out = sampler(x0, key=KEY)
    xi = torch.stack([cf.ops.normal((B, D), KEY.tensor(), step=step) for step in range(T)])
    torch.testing.assert_close(out.x, sampler(x0, xi=xi).x, rtol=0, atol=0)
    assert out.key == KEY.advance(T)


def test_snr_of_a_chain_does_not_depend_on_the_batch():
    x0 = normals(B, D)
    sampler = LangevinSampler(energy, n_steps=T, snr=0.2)
    whole = sampler(x0, key=KEY).x
    assert torch.equal(whole[2:], sampler(x0[2:], key=KEY.at_chain(2)).x)


def test_snr_of_several_tensors_and_a_chain_at_rest():
    def both(state):
        return state[0].square().sum(1) / 2 + state[1].square().sum((1, 2))

    x0 = [normals(B, D), normals(B, 2, 2, seed=1)]
    x0[0][1], x0[1][1] = 0.0, 0.0
    xi = [normals(1, B, D, seed=2), normals(1, B, 2, 2, seed=3)]
    out = LangevinSampler(both, n_steps=1, snr=0.2)(x0, xi=xi).x
    g = [x0[0], 2 * x0[1]]
    norms = [
        (a.square().sum(1) + b.square().sum((1, 2))).sqrt() for a, b in (g, (xi[0][0], xi[1][0]))
    ]
    size = 2 * (0.2 * norms[1] / norms[0]) ** 2
    size[1] = 0.0
    for j, x in enumerate(out):
        a = size.reshape(-1, *[1] * (x.ndim - 1))
        torch.testing.assert_close(x, x0[j] - a * g[j] + (2 * a).sqrt() * xi[j][0])


def test_snr_over_the_batch_leaves_out_chains_that_stopped():
    def breaks(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 50, torch.nan, 1.0) * x.square().sum(1)

    x0 = normals(B, D)
    x0[1, 0] = 100.0
    sampler = LangevinSampler(breaks, n_steps=3, snr=0.1, snr_over="batch", on_nonfinite="freeze")
    out = sampler(x0, key=KEY)
    assert out.frozen_at.tolist() == [3, 0, 3, 3]
    assert out.x.isfinite().all()
    # Nor does their noise count: the others move as without them.
    xi = normals(3, B, D)
    others = [0, 2, 3]
    alone = sampler(x0[others], xi=xi[:, others]).x
    torch.testing.assert_close(sampler(x0, xi=xi).x[others], alone)


BESIDE_SNR = {
    "step_size": 0.1, "drift": 0.1, "temperature": 0.5, "reference_std": 1.0, "denoise": 0.1,
    "pull": (None, 1.0), "noise_before_gradient": True, "differentiable": True,
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE_SNR)
def test_what_snr_does_not_go_with(name):
    with pytest.raises(ValueError, match=f"snr .*{name}"):
        LangevinSampler(energy, n_steps=2, snr=0.1, **{name: BESIDE_SNR[name]})
    if name == "step_size":
        with pytest.raises(ValueError, match=r"snr .*step_size"):
            LangevinSampler(energy, n_steps=2, snr=0.1)(normals(B, D), step_size=0.1)


def test_bad_snr():
    with pytest.raises(ValueError, match="snr must be ≥ 0"):
        LangevinSampler(energy, n_steps=2, snr=-0.1)
    with pytest.raises(ValueError, match="snr_over must be one of 'chain', 'batch'"):
        LangevinSampler(energy, n_steps=2, snr=0.1, snr_over="all")
    with pytest.raises(ValueError, match="snr, preconditioner and momentum need steps one by one"):
        LangevinSampler(MLPEnergy(D), n_steps=2, snr=0.1, kernel=True)


P = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


@pytest.mark.parametrize("noise_first", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"clamp": (-0.7, 0.7)}, {"grad_clip": 0.6}, {"denoise": 0.1}, {"on_nonfinite": "ignore"}
])  # fmt: skip
def test_preconditioner(captured, noise_first, options):
    x0, xi = normals(B, D), normals(T, B, D, seed=1)
    drift = torch.linspace(0.05, 0.1, B, dtype=torch.float64)[:, None]
    noise = (2 * drift).sqrt() * P.sqrt()
    rows, drifts = list(xi), [drift] * T
    if "denoise" in options:
        rows.append(torch.zeros(B, D))
        drifts.append(torch.tensor(0.1))
    x = x0
    for z, a in zip(rows, drifts, strict=True):
        x = x + noise * z if noise_first else x
        g = P * gradient(x)
        g = g.clamp(-0.6, 0.6) if "grad_clip" in options else g
        x = x - a * g
        x = x if noise_first else x + noise * z
        x = x.clamp(*options["clamp"]) if "clamp" in options else x
    sampler = LangevinSampler(
        energy, n_steps=T, drift=drift.T, preconditioner=P, noise_before_gradient=noise_first,
        **options,
    )  # fmt: skip
    torch.testing.assert_close(sampler(x0, xi=xi).x, x)


def test_preconditioner_with_the_keys_noise_is_a_change_of_variables():
    """y = x/√P moves by the plain chain of U(√P·y), with the same normals."""
    x0, root = normals(B, D), P.sqrt()
    common = {"n_steps": T, "step_size": 0.2}
    got = LangevinSampler(energy, preconditioner=P, **common)(x0, key=KEY).x
    plain = LangevinSampler(lambda y: energy(root * y), **common)(x0 / root, key=KEY).x
    torch.testing.assert_close(got, root * plain)


def test_preconditioner_of_several_tensors():
    def both(state):
        return energy(state[0]) + state[1].square().sum((1, 2))

    x0 = (normals(B, D), normals(B, 2, 2, seed=1))
    sampler = LangevinSampler(
        both, n_steps=1, drift=0.1, noise=0.0, preconditioner=[P, torch.tensor(0.5)]
    )
    x, y = sampler(x0).x
    torch.testing.assert_close(x, x0[0] - 0.1 * P * gradient(x0[0]))
    torch.testing.assert_close(y, x0[1] - 0.1 * x0[1])
    with pytest.raises(ValueError, match="preconditioner must have 1 tensor"):
        sampler(x0[0])


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1, 3, 1), (3, 2)])
def test_a_preconditioner_broadcasts_to_a_chain(shape):
    scale = normals(*shape, seed=4).square() + 0.1
    x0 = normals(B, 3, 2)
    sampler = LangevinSampler(
        score=lambda x: -x, n_steps=1, drift=0.1, noise=0.0, preconditioner=scale
    )
    if len(shape) > 2:
        with pytest.raises(ValueError, match=r"shape of a chain, \(3, 2\), got \(1, 3, 1\)"):
            sampler(x0)
        return
    torch.testing.assert_close(sampler(x0).x, x0 - 0.1 * scale * x0)


def test_a_preconditioner_is_copied_when_the_sampler_is_made():
    scale, x0 = P.clone(), normals(B, D)
    sampler = LangevinSampler(energy, n_steps=3, drift=0.1, preconditioner=scale)
    before = sampler(x0, key=KEY).x
    scale.fill_(0.01)
    assert torch.equal(sampler(x0, key=KEY).x, before)


def test_bad_preconditioner():
    def make(preconditioner, **options):
        return LangevinSampler(
            energy, n_steps=1, drift=0.1, preconditioner=preconditioner, **options
        )

    with pytest.raises(ValueError, match="preconditioner must be finite and > 0"):
        make(torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="preconditioner must be finite and > 0"):
        make(torch.tensor([1.0, torch.inf, 1.0]))
    with pytest.raises(TypeError, match=r"must be floating point, got torch\.int64"):
        make(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="preconditioner must be a tensor"):
        make(2.0)
    with pytest.raises(ValueError, match="preconditioner must not require grad"):
        make(P.clone().requires_grad_())
    with pytest.raises(ValueError, match="preconditioner must broadcast to the shape of a chain"):
        make(torch.ones(B, D))(normals(B, D))
    others = {"reference_std": 1.0, "pull": (None, 1.0), "differentiable": True}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"preconditioner cannot be used with {name}"):
            make(P, **{name: value})
    with pytest.raises(ValueError, match="snr cannot be used with preconditioner or momentum"):
        LangevinSampler(energy, n_steps=1, snr=0.1, preconditioner=P, momentum=0.5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("score", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_momentum(captured, nesterov, score, autocast):
    x0, mu = normals(B, D), 0.6
    drift = torch.linspace(0.1, 0.02, T, dtype=torch.float64)
    for n_steps in (T, 3):  # each chain starts at rest
        x, v = x0, torch.zeros_like(x0)
        for k in range(n_steps):
            point = x - drift[k] * mu * v if nesterov else x
            point = point if autocast is None else point.to(autocast)
            g = gradient(point).double()
            v = g if nesterov else mu * v + g
            x = x - drift[k] * v
        function = {"score": lambda x: -gradient(x)} if score else {"energy": energy}
        sampler = LangevinSampler(
            **function, n_steps=n_steps, drift=drift[:n_steps], noise=0.0, momentum=mu,
            nesterov=nesterov, autocast=autocast,
        )  # fmt: skip
        got = [sampler(x0).x for _ in range(2)]
        torch.testing.assert_close(got[0], x)
        assert torch.equal(*got)


def test_bad_momentum():
    with pytest.raises(ValueError, match="momentum must be ≥ 0"):
        LangevinSampler(energy, n_steps=1, drift=0.1, momentum=-0.1)
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        LangevinSampler(energy, n_steps=1, drift=0.1, nesterov=True)
    with pytest.raises(ValueError, match="momentum cannot be used with differentiable"):
        LangevinSampler(energy, n_steps=1, drift=0.1, momentum=0.1, differentiable=True)


def test_nesterov_with_a_step_size_for_each_chain():
    x0, drift = normals(B, D), torch.linspace(0.05, 0.2, B, dtype=torch.float64)[None]
    common = {"n_steps": 4, "noise": 0.0, "momentum": 0.5, "nesterov": True}
    whole = LangevinSampler(energy, drift=drift, **common)(x0).x
    for i in range(B):
        alone = LangevinSampler(energy, drift=float(drift[0, i]), **common)(x0[i : i + 1]).x
        torch.testing.assert_close(whole[i : i + 1], alone)


def test_norms_of_a_state_in_half_precision_do_not_overflow():
    """‖g‖ = 3e5, beyond float16."""
    ends = [
        LangevinSampler(score=lambda x: torch.full_like(x, 3000.0), n_steps=1, snr=30.0)(
            torch.zeros(1, 10_000, dtype=dtype), key=KEY
        ).x.float()
        for dtype in (torch.float16, torch.float32)
    ]
    assert ends[1].mean() > 0.5
    torch.testing.assert_close(*ends, rtol=0, atol=2e-3)  # an ulp of float16 at 0.6, and some
