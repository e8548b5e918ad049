"""Whole chains of energies in closed form: the op against a loop in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from instruction_sets import fingerprints
from thread_counts import by_threads
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext import energies, reference

KEY = cf.Key(0xDEADBEEF12345678, time=3, chain=11)
DTYPES = (torch.float32, torch.float64)
DIMS = (1, 2, 3, 4, 7, 64)
BATCHES = (0, 1, 15, 16, 17, 130)
NAMES = ("double_well", "funnel", "gaussian", "gaussian_mixture", "rastrigin", "rosenbrock")
BOUND = {torch.float32: 3e-6, torch.float64: 1e-14}  # of 1 + |x|, after a few steps


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make(name: str, dim: int) -> nn.Module:
    """An energy in float64."""
    if name == "gaussian":
        root = normal(dim, dim)
        covariance = root @ root.T / dim + torch.eye(dim, dtype=torch.float64)
        return energies.GaussianEnergy(normal(dim, seed=1), covariance)
    if name == "gaussian_mixture":
        return energies.GaussianMixtureEnergy(
            normal(5, dim), (normal(5, dim, seed=1).abs() + 0.4) * dim**0.5, normal(5, seed=2).abs()
        )
    return {
        "double_well": lambda: energies.DoubleWellEnergy(0.7),
        "funnel": lambda: energies.FunnelEnergy(dim, 1.5),
        "rastrigin": lambda: energies.RastriginEnergy(1.2),
        "rosenbrock": lambda: energies.RosenbrockEnergy(0.9, 3.0),
    }[name]()


def described(name: str, energy: nn.Module, like: Tensor) -> dict[str, Any]:
    """The energy as the op takes it."""
    tensors = {
        "gaussian": ("mean", "precision", "log_norm"),
        "gaussian_mixture": ("means", "stds", "log_weights"),
    }
    numbers = {
        "double_well": ("barrier_height",), "funnel": ("scale",), "rastrigin": ("a",),
        "rosenbrock": ("a", "b"),
    }  # fmt: skip
    return {
        "energy": name,
        "tensors": [getattr(energy, t).to(like) for t in tensors.get(name, ())],
        "numbers": [getattr(energy, n) for n in numbers.get(name, ())],
    }


def cases() -> list[tuple[str, int]]:
    return [(n, d) for n in NAMES for d in DIMS if d > 1 or n not in ("funnel", "rosenbrock")]


def plain(batch: int, dim: int, device: torch.device) -> dict[str, Any]:
    return {"drift": 0.01, "noise": 0.1}


def full(batch: int, dim: int, device: torch.device) -> dict[str, Any]:
    """Every option; the noise is the key's."""
    return {
        "drift": 0.01 + 0.01 * normal(8, batch).abs().to(device),
        "noise": (0.1 + 0.1 * normal(8, 1).abs()).float().to(device),
        "decay": 0.05 * normal(1, batch).abs().to(device),
        "pull": 0.1, "x_ref": normal(batch, dim, seed=5).to(device), "grad_clip": 2.0,
        "grad_norm": 2.5, "step_clip": 0.3, "clamp": (-1.5, 1.5), "clamp_end": True,
        "negative_energy": True, "step": 2,
    }  # fmt: skip


OPTIONS = {"plain": plain, "full": full}


def run(
    name: str, x0: Tensor, n_steps: int = 4, *, energy: nn.Module | None = None, **options: Any
) -> cf.ops.ChainResult:
    energy = make(name, x0.shape[1]) if energy is None else energy
    return cf.ops.analytic_langevin_chain(
        x0, KEY.tensor(x0.device), **described(name, energy, x0), n_steps=n_steps,
        **{k: v.to(x0.dtype) if k in ("x_ref", "xi") else v for k, v in options.items()},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("name", "dim"), cases())
def test_matches_a_loop_of_the_reference(
    device: torch.device, name: str, dim: int, options: str, dtype: torch.dtype
) -> None:
    for batch in BATCHES:
        x0 = normal(batch, dim, seed=3).to(device, dtype)
        given = OPTIONS[options](batch, dim, device)
        ours = run(name, x0, thin=3, stats=True, **given)
        wide = {k: v.cpu().double() if isinstance(v, Tensor) else v for k, v in given.items()}
        x, trajectory, _ = reference.langevin_chain(
            x0.cpu().double(), KEY.tensor(), make(name, dim), n_steps=4, thin=3, **wide
        )
        assert ours.x.dtype == dtype
        # On a GPU normals near zero differ more: approximate logarithms near 1.
        bound = BOUND[dtype] if device.type == "cpu" else 2e-3
        for result, exact in ((ours.x, x), (ours.trajectory, trajectory)):
            assert result is not None
            assert exact is not None
            torch.testing.assert_close(result.cpu().double(), exact, rtol=bound, atol=bound)
        assert ours.frozen_at.tolist() == [given.get("step", 0) + 4] * batch
        # Without statistics, other kernels: the same chain.
        alone = run(name, x0, **given)
        assert alone.trajectory is None
        assert alone.stats is None
        assert torch.equal(alone.x, ours.x)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_step_of_the_other_ops(device: torch.device, name: str) -> None:
    """The noise bit for bit, the gradient to rounding."""
    x0 = normal(37, 6).to(device)
    energy = make(name, 6).to(device)
    xi = normal(1, 37, 6, seed=4).to(device)
    for noise in ({}, {"xi": xi}):
        ours = run(name, x0, 1, drift=0.02, noise=0.3, step=1, **noise).x
        step = cf.ops.langevin_step(
            x0, -energy.score(x0), KEY.tensor(device), drift=0.02, noise=0.3, step=1,
            xi=xi[0] if noise else None,
        )  # fmt: skip
        torch.testing.assert_close(ours, step, rtol=1e-14, atol=1e-14)
    still = run(name, x0, 3, drift=0.0, noise=0.0).x
    assert torch.equal(still, x0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_steps(device: torch.device, name: str, dtype: torch.dtype) -> None:
    x0 = normal(21, 3, seed=3).to(device, dtype)
    energy = make(name, 3).to(device, dtype)
    options = full(21, 3, device) | {"clamp_end": False, "x_ref": normal(21, 3).to(x0)}
    result = run(name, x0, 3, stats=True, thin=1, **options)
    assert result.stats is not None
    assert result.trajectory is not None
    assert result.stats.shape == (3, 21, 6)
    step = options.pop("step")
    options["is_score"] = options.pop("negative_energy")
    options.pop("clamp_end")
    for k, before in enumerate((x0, *result.trajectory[:-1])):
        sums = torch.empty(21, 5, dtype=dtype, device=device)
        cf.ops.langevin_step_(
            before.clone(), -energy.score(before), KEY.tensor(device), **options, step=step + k,
            stats=sums,
        )  # fmt: skip
        bound = 2e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(result.stats[k, :, :5], sums, rtol=bound, atol=bound)
        torch.testing.assert_close(result.stats[k, :, 5], energy(before), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_chain_does_not_know_its_batch(
    device: torch.device, name: str, options: str, dtype: torch.dtype
) -> None:
    for dim in (2, 5):
        x0 = normal(50, dim).to(device, dtype)
        given = OPTIONS[options](50, dim, device)
        whole = run(name, x0, thin=2, stats=True, **given)
        for first, last in ((17, 18), (3, 36)):
            part = {
                k: v[:, first:last] if k in ("drift", "decay") and isinstance(v, Tensor)
                else v[first:last] if k == "x_ref" else v
                for k, v in given.items()
            }  # fmt: skip
            few = cf.ops.analytic_langevin_chain(
                x0[first:last], KEY.at_chain(KEY.chain + first).tensor(device),
                **described(name, make(name, dim), x0), n_steps=4, thin=2, stats=True,
                **{k: v.to(dtype) if k == "x_ref" else v for k, v in part.items()},
            )  # fmt: skip
            assert torch.equal(few.x, whole.x[first:last])
            assert torch.equal(few.trajectory, whole.trajectory[:, first:last])
            assert torch.equal(few.stats, whole.stats[:, first:last])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 15])
def test_few_chains_are_those_of_many(
    device: torch.device, count: int, dim: int, dtype: torch.dtype
) -> None:
    """A CPU draws the noise of a few chains for several steps at once: 40 steps need it often."""
    x0 = normal(20, dim).to(device, dtype)
    options = {"energy": "double_well", "numbers": [2.0], "n_steps": 40, "drift": 0.01}
    many, few = (
        cf.ops.analytic_langevin_chain(
            x0[first : first + n], KEY.at_chain(KEY.chain + first).tensor(device), **options,
            noise=0.1, thin=1,
        )
        for first, n in ((0, 20), (3, count))
    )  # fmt: skip
    assert torch.equal(few.x, many.x[3 : 3 + count])
    assert torch.equal(few.trajectory, many.trajectory[:, 3 : 3 + count])


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_a_bit(name: str) -> None:
    x0 = normal(2000, 3).float()
    one, *others = by_threads(lambda: run(name, x0, 5, drift=0.01, noise=0.1).x)
    assert all(torch.equal(one, other) for other in others)


_FINGERPRINT = """
import hashlib
import test_analytic_langevin_chain as chains, torch
digest = hashlib.sha256()
cpu = torch.device("cpu")
for name, dim in chains.cases():
    for dtype in chains.DTYPES:
        for options in chains.OPTIONS.values():
            x0 = chains.normal(37, dim, seed=3).to(dtype)
            for recorded in ({}, {"stats": True, "thin": 1}):
                result = chains.run(name, x0, 5, **recorded, **options(37, dim, cpu))
                for t in result:
                    if t is not None:
                        digest.update(t.numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_give_the_same_bits() -> None:
    prints = fingerprints(_FINGERPRINT)
    assert len(set(prints.values())) == 1, prints


def test_steps_can_be_split(device: torch.device) -> None:
    x0 = normal(9, 2).to(device)
    options = {"drift": 0.01 * (1 + torch.arange(6.0, device=device))[:, None], "noise": 0.1}
    whole = run("double_well", x0, 6, **options)
    half = run("double_well", x0, 4, **options)
    rest = run("double_well", half.x, 2, step=4, **options)
    assert torch.equal(rest.x, whole.x)
    assert torch.equal(run("double_well", x0, 0, **options).x, x0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_chains_stop_at_a_gradient_that_is_not_finite(
    device: torch.device, name: str, options: str
) -> None:
    x0 = normal(20, 3).float().to(device)
    x0[4, 1], x0[17, 2] = math.nan, math.inf
    # So far out that x squared overflows, and one that leaves on its way.
    given = OPTIONS[options](20, 3, device)
    start = given.get("step", 0)
    result = run(name, x0, 4, thin=1, stats=True, freeze_nonfinite=True, **given)
    free = run(name, x0, 4, **given)
    stopped = torch.tensor([4, 17], device=device)
    assert result.trajectory is not None
    assert result.stats is not None
    assert result.frozen_at[stopped].tolist() == [start, start]
    for state in result.trajectory:
        torch.testing.assert_close(state[stopped], x0[stopped], rtol=0, atol=0, equal_nan=True)
    others = result.frozen_at == start + 4
    assert others.sum() == 18
    assert torch.equal(result.x[others], free.x[others])
    assert (result.stats[:, stopped, 4] > 0).all()
    assert (result.stats[:, stopped, 1:4] == 0).all()


def test_a_chain_that_runs_away_stops_on_its_way(device: torch.device) -> None:
    x0 = torch.tensor([[0.1, 0.2], [30.0, -30.0]], device=device)
    result = run("double_well", x0, 12, thin=1, freeze_nonfinite=True, drift=0.1)
    assert result.frozen_at[0] == 12
    at = int(result.frozen_at[1])
    assert 1 < at < 12
    assert result.trajectory is not None
    assert result.trajectory[at - 1, 1].isfinite().all()
    assert torch.equal(result.x[1], result.trajectory[at - 1, 1])


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_gaussian_keeps_its_law(device: torch.device, dim: int) -> None:
    """U = x' P x / 2, x ← x − a P x + s ξ: along an eigenvector of P with eigenvalue l the variance
    tends to s² / (1 − (1 − a l)²)."""
    root = normal(dim, dim)
    covariance = root @ root.T / dim + torch.eye(dim, dtype=torch.float64)
    mean = normal(dim, seed=1)
    energy = energies.GaussianEnergy(mean, covariance)
    x0 = mean.float().expand(40_000, dim).contiguous().to(device)
    x = run("gaussian", x0, 200, energy=energy, drift=0.1, noise=math.sqrt(0.2)).x.cpu().double()
    eigenvalues, vectors = torch.linalg.eigh(energy.precision)
    along = (x - mean) @ vectors
    expected = 0.2 / (1 - (1 - 0.1 * eigenvalues) ** 2)
    # Five standard errors of a variance and of a mean.
    torch.testing.assert_close(along.var(0), expected, rtol=5 * math.sqrt(2 / 40_000), atol=0)
    assert (along.mean(0).abs() < 5 * (expected / 40_000).sqrt()).all()


def test_a_mixture_keeps_its_weights(device: torch.device) -> None:
    """Between two wells so near that chains cross, started at one of them."""
    means, weights = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.3, 0.7])
    energy = energies.GaussianMixtureEnergy(means, 0.6, weights).to(device)
    x0 = means[:1].expand(20_000, 2).contiguous().to(device)
    x = run("gaussian_mixture", x0, 1500, energy=energy, drift=0.02, noise=0.2).x
    # The mean of x lies where the weights put it; the step's bias is of the order of the drift.
    expected = (weights[:, None] * means).sum(0)
    torch.testing.assert_close(x.mean(0).cpu(), expected, rtol=0, atol=0.04)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_far_from_everything(device: torch.device, name: str, dtype: torch.dtype) -> None:
    """Large and small numbers: gradients agree with autograd's wherever these are finite."""
    x0 = normal(64, 4).to(device, dtype) * torch.logspace(-6, 2, 64, device=device)[:, None]
    x0 = x0.to(dtype)
    energy = make(name, 4).to(device, dtype)
    moved = run(name, x0, 1, energy=energy, drift=1.0).x
    exact = (x0.double() - -make(name, 4).to(device).score(x0.double())).cpu()
    scale = exact.abs().amax(1, keepdim=True) + 1
    bound = 2e-5 if dtype == torch.float32 else 1e-13
    assert (((moved.cpu().double() - exact) / scale).abs() < bound).all()


def test_one_graph_under_compile(device: torch.device) -> None:
    x0 = normal(5, 2).float().to(device)
    rng = KEY.tensor(device)

    def chain(x0: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
        result = cf.ops.analytic_langevin_chain(
            x0, rng, energy="double_well", numbers=[1.0], n_steps=3, drift=0.1, noise=0.1, thin=2
        )
        assert result.trajectory is not None
        return result.x * 2, result.trajectory

    torch.compiler.reset()
    compiled = torch.compile(chain, fullgraph=True)
    for ours, expected in zip(compiled(x0, rng), chain(x0, rng), strict=True):
        assert torch.equal(ours, expected)


def test_x0_is_not_changed_and_needs_no_gradient(device: torch.device) -> None:
    x0 = normal(3, 2).to(device)
    before = x0.clone()
    run("funnel", x0, drift=0.1, noise=0.1)
    assert torch.equal(x0, before)
    with pytest.raises(ValueError, match="x0 requires grad"):
        run("funnel", x0.requires_grad_(), drift=0.1)
    with torch.no_grad():
        assert not run("funnel", x0, drift=0.1).x.requires_grad


BAD = {
    "energy: must be one of double_well, funnel": {"energy": "well"},
    "numbers: must be 1 for this energy, got 2": {"numbers": [1.0, 2.0]},
    "barrier_height: must be finite": {"numbers": [math.inf]},
    "tensors: must be 0": {"tensors": [torch.zeros(2)]},
    "scale: must be positive": {"energy": "funnel", "numbers": [-1.0]},
    "n_steps: must not be negative": {"n_steps": -1},
    "thin must be ≥ 1": {"thin": 0},
    "row 3 was asked of a coefficient table with 3 rows": {"drift": torch.ones(3, 1), "n_steps": 4},
    r"drift: must have shape \(T or 1, B or 1\) with B = 4": {"drift": torch.ones(3)},
    "noise: must not be negative": {"noise": -1.0},
    "pull: needs x_ref": {"pull": 1.0},
    "grad_norm: must be positive": {"grad_norm": 0.0},
    r"clamp: must be \(low, high\)": {"clamp": (1.0, -1.0)},
    r"xi: must have shape \(n_steps, B, D\) = \(2, 4, 2\), got \(4, 2\)": {"xi": torch.zeros(4, 2)},
    "x_ref: must have the shape of x": {"pull": 1.0, "x_ref": torch.zeros(4, 3)},
    r"x0: must have shape \(B, D\), got \(4, 2, 1\)": {"x0": torch.zeros(4, 2, 1)},
    "x0: must be dense": {"x0": torch.zeros(4, 4)[:, ::2].t().contiguous().t()},
    r"step: must be in \[0, 2\*\*32\)": {"step": 2**32 - 1},
    r"rng: must have shape \(3,\)": {"rng": torch.zeros(2, dtype=torch.int64)},
    r"x0: must have D >= 2 for this energy": {
        "x0": torch.zeros(4, 1), "energy": "rosenbrock", "numbers": [1.0, 1.0]
    },
    r"means: must have one dimension for each letter of 'KD', with D = 2": {
        "energy": "gaussian_mixture", "numbers": [],
        "tensors": [torch.zeros(5, 3), torch.ones(5, 3), torch.zeros(5)],
    },
    r"log_weights: must have one dimension for each letter of 'K'": {
        "energy": "gaussian_mixture", "numbers": [],
        "tensors": [torch.zeros(5, 2), torch.ones(5, 2), torch.zeros(4)],
    },
    r"precision: must be contiguous": {
        "energy": "gaussian", "numbers": [],
        "tensors": [torch.zeros(2), torch.ones(2, 4)[:, ::2], torch.zeros(())],
    },
}  # fmt: skip


def call(**changes: Any) -> cf.ops.ChainResult:
    arguments: dict[str, Any] = {
        "x0": torch.zeros(4, 2), "rng": KEY.tensor(), "energy": "double_well", "numbers": [1.0],
        "n_steps": 2, "drift": 0.1,
    }  # fmt: skip
    return cf.ops.analytic_langevin_chain(**{**arguments, **changes})


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**BAD[message])


def test_bad_types_are_named() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match="x0: must have dtype float32 or float64, got dtype"):
            call(x0=torch.zeros(4, 2, dtype=dtype))
    with pytest.raises(TypeError, match="x0: must have dtype float32"):
        call(x0=torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="mean: must have dtype float32, got dtype float64"):
        call(
            energy="gaussian", numbers=[],
            tensors=[torch.zeros(2).double(), torch.eye(2), torch.zeros(())],
        )  # fmt: skip
    with pytest.raises(TypeError, match="xi: must have dtype float32"):
        call(xi=torch.zeros(2, 4, 2).double())
    with pytest.raises(TypeError):
        call(x0=None)
    with pytest.raises(TypeError):
        call(energy=3)


@pytest.mark.gpu
def test_a_chain_that_a_thread_cannot_hold_is_refused() -> None:
    most = cf.ops.MOST_ELEMENTS_ON_CUDA
    run("double_well", torch.zeros(3, most, device="cuda"), drift=0.1)
    with pytest.raises(ValueError, match=f"x0: must have D <= {most} on CUDA"):
        run("double_well", torch.zeros(3, most + 1, device="cuda"), drift=0.1)


def test_a_chain_says_that_it_has_no_derivative() -> None:
    """Of its coefficients; parameters of the energy get none, as in a sampler."""
    x, rng = torch.randn(2, 3), cf.Key(0).tensor()
    means = torch.randn(4, 3, requires_grad=True)
    energy = {"energy": "gaussian_mixture", "tensors": [means, torch.ones(4, 3), torch.zeros(4)]}
    drift = torch.full((1, 1), 0.1, requires_grad=True)
    with pytest.raises(ValueError, match="drift requires grad, but a whole chain has no deriv"):
        cf.ops.analytic_langevin_chain(x, rng, **energy, n_steps=2, drift=drift)
    out = cf.ops.analytic_langevin_chain(x, rng, **energy, n_steps=2, drift=0.1)
    assert not out.x.requires_grad


def test_a_chain_refuses_forward_mode() -> None:
    x, rng = torch.randn(2, 3), cf.Key(0).tensor()

    def chain(x0: Tensor) -> Tensor:
        options = {"energy": "double_well", "numbers": [1.0], "n_steps": 2, "drift": 0.1}
        return cf.ops.analytic_langevin_chain(x0, rng, **options).x

    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(RuntimeError, match="x0 has a tangent, but a whole chain"):
            torch.func.jvp(chain, (x,), (torch.ones_like(x),))
