"""Whole MALA chains in one launch: the ops against the reference, MALASampler(kernel=…) against its
own loop, and the law of both."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from instruction_sets import fingerprints
from test_analytic_langevin_chain import described, make, normal
from test_mlp import arguments, cast
from test_sampler_kernel import ENERGIES, CountOps, starts
from thread_counts import by_threads
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext import energies, reference
from coopflow_ext.rng import USE_ACCEPT
from coopflow_ext.samplers import MALASampler
from coopflow_ext.samplers.mala import MALAOutput

KEY = cf.Key(0xDEADBEEF12345678, time=3, chain=11)
ACCEPT = KEY.fold_in(USE_ACCEPT)
DTYPES = (torch.float32, torch.float64)
BOUND = {torch.float32: 2e-5, torch.float64: 1e-12}
NAMES = ("double_well", "funnel", "gaussian", "gaussian_mixture", "rastrigin", "rosenbrock")


class Family:
    """Energies of one op: their chains, and the same energies in plain PyTorch."""

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim
        if name == "network":
            given = arguments(1, dim, (20, 16), "tanh", torch.float64)
            self.network = {key: given[key] for key in ("weights", "biases", "activation")}
        else:
            self.energy = make(name, dim)

    def __call__(self, x: Tensor) -> Tensor:
        if self.name == "network":
            return reference.mlp_energy(x, **self.network)
        value: Tensor = self.energy(x)
        return value

    def run(self, x0: Tensor, key: cf.Key = KEY, **options: Any) -> cf.ops.MALAResult:
        keys = {
            "rng": key.tensor(x0.device),
            "accept_rng": key.fold_in(USE_ACCEPT).tensor(x0.device),
        }
        options = {"n_steps": 4, "step_size": 0.3, **options}
        if self.name == "network":
            network = cast(self.network, x0.dtype, x0.device)
            return cf.ops.mlp_mala_chain(x0, **network, **keys, **options)
        given = described(self.name, self.energy, x0)
        return cf.ops.analytic_mala_chain(x0, **given, **keys, **options)


CASES = [
    (name, dim) for name in (*NAMES, "network") for dim in (1, 2, 5, 17)
    if dim > 1 or name not in ("funnel", "rosenbrock")
]  # fmt: skip


def only_where_it_runs(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if name == "network" and device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 networks run on the CPU alone")


def plain(batch: int, dim: int) -> dict[str, Any]:
    return {"step_size": 0.3}


def full(batch: int, dim: int) -> dict[str, Any]:
    sizes = 0.1 + 0.3 * normal(6, batch).abs()
    return {"step_size": sizes, "temperature": 1.7, "negative_energy": True, "step": 2}


def given_noise(batch: int, dim: int) -> dict[str, Any]:
    return {"step_size": torch.tensor([[0.4], [0.2], [0.1], [0.5]]), "xi": normal(4, batch, dim)}


def adapted(batch: int, dim: int) -> dict[str, Any]:
    return {"step_size": 0.1 + normal(1, batch).abs(), "adapt_steps": 3, "target_accept": 0.7}


OPTIONS = {"plain": plain, "full": full, "given noise": given_noise, "adapted": adapted}


def placed(options: dict[str, Any], x0: Tensor) -> dict[str, Any]:
    """Tables in the widest dtype that the case gives, the noise in the state's."""
    return {
        k: v.to(x0) if k == "xi" else v.to(x0.device) if isinstance(v, Tensor) else v
        for k, v in options.items()
    }


# --- the ops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("name", "dim"), CASES)
def test_matches_the_reference(
    device: torch.device, name: str, dim: int, options: str, dtype: torch.dtype
) -> None:
    only_where_it_runs(name, dtype, device)
    family = Family(name, dim)
    for batch in (0, 1, 16, 37):
        x0 = normal(batch, dim, seed=3).to(device, dtype)
        given = OPTIONS[options](batch, dim)
        ours = family.run(x0, thin=1, stats=True, **placed(given, x0))
        states, stats, sizes = reference.mala_chain(
            x0.cpu().double(), KEY.tensor(), ACCEPT.tensor(), family, n_steps=4, **given
        )
        assert ours.trajectory is not None
        assert ours.stats is not None
        assert ours.x.dtype == ours.stats.dtype == ours.step_size.dtype == dtype
        assert ours.finite.tolist() == [True] * batch
        # The same decisions; on a GPU normals near zero differ more, and a few decisions with them.
        same = (ours.stats[..., 3].cpu() == stats[..., 3]).all(0)
        assert same.sum() >= batch - (2 if device.type == "cuda" else 0)
        bound = 5e-3 if device.type == "cuda" else BOUND[dtype]
        for result, exact, times in (
            (ours.trajectory[:, same], states[:, same], 1), (ours.step_size[same], sizes[same], 1),
            (ours.stats[:, same], stats[:, same], 10),  # a ratio is a difference of large terms
        ):  # fmt: skip
            torch.testing.assert_close(
                result.cpu().double(), exact, rtol=times * bound, atol=times * bound
            )
        assert torch.equal(ours.x, ours.trajectory[-1])
        alone = family.run(x0, **placed(given, x0))
        assert alone.trajectory is None
        assert alone.stats is None
        assert torch.equal(alone.x, ours.x)
        thinned = family.run(x0, thin=3, **placed(given, x0)).trajectory
        assert thinned is not None
        assert torch.equal(thinned, ours.trajectory[2:3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gaussian", "network"])
def test_a_uniform_accepts_the_proposal_of_a_step(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    """Bit for bit the uniforms of ``uniform``, and to the gradient's rounding the proposals of
    ``langevin_step``."""
    only_where_it_runs(name, dtype, device)
    family = Family(name, 3)
    x0 = normal(200, 3).to(device, dtype)
    ours = family.run(x0, n_steps=1, step_size=1.4, step=5, stats=True)
    assert ours.stats is not None
    _, _, acceptance, accepted, step_size = ours.stats[0].unbind(-1)
    uniforms = cf.ops.uniform((200,), ACCEPT.tensor(device), step=5)
    assert torch.equal(accepted != 0, uniforms < acceptance)
    assert 0.1 < accepted.mean() < 0.95
    assert (step_size == torch.tensor(1.4, dtype=dtype)).all()
    leaf = x0.cpu().double().requires_grad_()
    (grad,) = torch.autograd.grad(family(leaf).sum(), leaf)
    proposals = cf.ops.langevin_step(
        x0, grad.to(x0), KEY.tensor(device), drift=0.98, noise=1.4, step=5
    )
    bound = 2e-5 if dtype == torch.float32 else 1e-13
    expected = torch.where(accepted[:, None] != 0, proposals, x0)
    torch.testing.assert_close(ours.x, expected, rtol=bound, atol=bound)
    assert torch.equal(ours.x[accepted == 0], x0[accepted == 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["full", "adapted"])
@pytest.mark.parametrize("name", [*NAMES, "network"])
def test_a_chain_does_not_know_its_batch(
    device: torch.device, name: str, options: str, dtype: torch.dtype
) -> None:
    only_where_it_runs(name, dtype, device)
    family = Family(name, 5)
    x0 = normal(50, 5).to(device, dtype)
    given = placed(OPTIONS[options](50, 5), x0)
    whole = family.run(x0, thin=2, stats=True, **given)
    for first, last in ((17, 18), (3, 36)):
        part = given | {"step_size": given["step_size"][:, first:last]}
        key = KEY.at_chain(KEY.chain + first)
        few = family.run(x0[first:last], key, thin=2, stats=True, **part)
        assert few.trajectory is not None
        assert few.stats is not None
        assert whole.trajectory is not None
        assert whole.stats is not None
        assert torch.equal(few.x, whole.x[first:last])
        assert torch.equal(few.trajectory, whole.trajectory[:, first:last])
        assert torch.equal(few.stats, whole.stats[:, first:last])
        assert torch.equal(few.step_size, whole.step_size[first:last])


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", ["double_well", "network"])
def test_few_chains_are_those_of_many(device: torch.device, name: str, count: int) -> None:
    """A CPU draws the noise of a few chains for several steps at once."""
    family = Family(name, 5)
    x0 = normal(20, 5).to(device)
    options = {"n_steps": 40, "step_size": 0.2, "thin": 1}
    many = family.run(x0, **options)
    few = family.run(x0[3 : 3 + count], KEY.at_chain(KEY.chain + 3), **options)
    assert many.trajectory is not None
    assert few.trajectory is not None
    assert torch.equal(few.trajectory, many.trajectory[:, 3 : 3 + count])


@pytest.mark.parametrize("name", ["gaussian_mixture", "network"])
def test_threads_do_not_change_a_bit(name: str) -> None:
    family = Family(name, 3)
    x0 = normal(2000, 3).float()
    one, *others = by_threads(lambda: family.run(x0, step_size=0.8, adapt_steps=2).x)
    assert all(torch.equal(one, other) for other in others)


_FINGERPRINT = """
import hashlib
import test_mala_chain as chains, torch
digest = hashlib.sha256()
for name, dim in chains.CASES[1::2]:
    family = chains.Family(name, dim)
    for dtype in chains.DTYPES:
        for options in chains.OPTIONS.values():
            x0 = chains.normal(37, dim, seed=3).to(dtype)
            result = family.run(x0, thin=1, stats=True, **chains.placed(options(37, dim), x0))
            for t in result:
                digest.update(t.numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_give_the_same_bits() -> None:
    prints = fingerprints(_FINGERPRINT)
    assert len(set(prints.values())) == 1, prints


@pytest.mark.parametrize("name", ["rastrigin", "network"])
def test_steps_can_be_split(device: torch.device, name: str) -> None:
    family = Family(name, 2)
    x0 = normal(9, 2).float().to(device)
    options = {"step_size": 0.1 * (1 + torch.arange(6.0, device=device))[:, None]}
    whole = family.run(x0, n_steps=6, **options)
    half = family.run(x0, **options)
    assert torch.equal(family.run(half.x, n_steps=2, step=4, **options).x, whole.x)
    none = family.run(x0, n_steps=0, step_size=0.2)
    assert torch.equal(none.x, x0)
    assert torch.equal(none.step_size, torch.full((9,), 0.2, device=device))
    before = x0.clone()
    assert not torch.equal(whole.x, x0)
    assert torch.equal(x0, before)


def test_what_is_not_finite_is_rejected(device: torch.device) -> None:
    """In the start, which the result tells, and in a proposal: U is infinite far out, of either
    sign."""
    x0 = torch.tensor([[0.5], [math.nan], [math.inf], [1e10], [1e6]], device=device)
    for barrier_height in (1.0, -1.0):
        result = cf.ops.analytic_mala_chain(
            x0, KEY.tensor(device), ACCEPT.tensor(device), energy="double_well",
            numbers=[barrier_height], n_steps=3, step_size=0.3, stats=True,
        )  # fmt: skip
        assert result.stats is not None
        assert result.finite.tolist() == [True, False, False, False, True]
        assert result.x[0].isfinite().all()
        stays = torch.tensor([1, 2, 4], device=device)
        assert torch.equal(result.x[stays].nan_to_num(7), x0[stays].nan_to_num(7))
        assert (result.stats[:, stays, 2:4] == 0).all()
    bad = arguments(1, 2, (8,), "tanh")
    bad["biases"][0][3] = math.nan
    network = {key: cast(bad[key], torch.float32, device) for key in ("weights", "biases")}
    x0 = normal(5, 2).float().to(device)
    still = cf.ops.mlp_mala_chain(
        x0, **network, rng=KEY.tensor(device), accept_rng=ACCEPT.tensor(device),
        activation="tanh", n_steps=3, step_size=0.1,
    )  # fmt: skip
    assert torch.equal(still.x, x0)
    assert not still.finite.any()


def test_states_without_elements() -> None:
    family = Family("network", 1)
    network = {**family.network, "weights": [torch.zeros(20, 0).double()]}
    network["weights"] += family.network["weights"][1:]
    result = cf.ops.mlp_mala_chain(
        torch.zeros(3, 0).double(), **network, rng=KEY.tensor(), accept_rng=ACCEPT.tensor(),
        n_steps=2, step_size=0.1, stats=True,
    )  # fmt: skip
    assert result.stats is not None
    assert result.finite.all()
    assert (result.stats[..., 2:4] == 1).all()


def test_one_graph_under_compile(device: torch.device) -> None:
    x0 = normal(5, 2).float().to(device)
    rng, accept_rng = KEY.tensor(device), ACCEPT.tensor(device)

    def chain(x0: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        result = cf.ops.analytic_mala_chain(
            x0, rng, accept_rng, energy="double_well", numbers=[1.0], n_steps=3, step_size=0.4,
            thin=2, stats=True,
        )  # fmt: skip
        return result.x * 2, result.trajectory, result.stats

    torch.compiler.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(x0), chain(x0), strict=True):
        assert torch.equal(ours, expected)


BAD: dict[str, dict[str, Any]] = {
    "energy: must be one of double_well": {"energy": "well"},
    "numbers: must be 1 for this energy": {"numbers": []},
    "n_steps: must not be negative": {"n_steps": -1},
    "thin must be ≥ 1": {"thin": 0},
    "step_size: must be positive, got 0": {"step_size": 0.0},
    "step_size: must be finite": {"step_size": math.inf},
    r"step_size: must have shape \(T or 1, B or 1\) with B = 4": {"step_size": torch.ones(3)},
    "row 3 was asked of a coefficient table with 3 rows": {
        "step_size": torch.ones(3, 1), "n_steps": 4
    },
    "temperature: must be positive": {"temperature": 0.0},
    "temperature: must be finite": {"temperature": math.inf},
    r"adapt_steps: must be in \[0, n_steps = 2\], got 3": {"adapt_steps": 3},
    "adapt_steps: needs a step_size that is the same": {
        "adapt_steps": 1, "step_size": torch.ones(2, 1)
    },
    "target_accept: must be between 0 and 1, got 1": {"target_accept": 1.0},
    r"xi: must have shape \(n_steps, B, D\)": {"xi": torch.zeros(4, 2)},
    r"x0: must have shape \(B, D\)": {"x0": torch.zeros(4, 2, 1)},
    r"step: must be in \[0, 2\*\*32\)": {"step": 2**32 - 1},
    r"accept_rng: must have shape \(3,\)": {"accept_rng": torch.zeros(2, dtype=torch.int64)},
    "x0 requires grad": {"x0": torch.zeros(4, 2, requires_grad=True)},
}  # fmt: skip


def call(**changes: Any) -> cf.ops.MALAResult:
    given: dict[str, Any] = {
        "x0": torch.zeros(4, 2), "rng": KEY.tensor(), "accept_rng": ACCEPT.tensor(),
        "energy": "double_well", "numbers": [1.0], "n_steps": 2, "step_size": 0.1,
    }  # fmt: skip
    return cf.ops.analytic_mala_chain(**{**given, **changes})


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**BAD[message])


def test_bad_types_are_named() -> None:
    with pytest.raises(TypeError, match="x0: must have dtype float32 or float64"):
        call(x0=torch.zeros(4, 2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="accept_rng: must have dtype int64"):
        call(accept_rng=torch.zeros(3))
    with pytest.raises(TypeError, match="step_size must be a float or a tensor, got None"):
        call(step_size=None)
    network = {key: arguments()[key] for key in ("x0", "weights", "biases", "rng")}
    options = {"accept_rng": ACCEPT.tensor(), "n_steps": 1, "step_size": 0.1}
    with pytest.raises(ValueError, match=r"mlp_mala_chain: activation must be one of 'silu'"):
        cf.ops.mlp_mala_chain(**network, activation="sine", **options)
    network["weights"] = network["weights"][:1]
    with pytest.raises(ValueError, match=r"mlp_mala_chain: weights: must be 2 to 5 matrices"):
        cf.ops.mlp_mala_chain(**network, activation="silu", **options)


# --- the sampler ----------------------------------------------------------------------------------


def two_humps() -> nn.Sequential:
    """A network whose e^(−U) can be integrated: softplus(3 x + 1) + softplus(−3 x + 1)."""
    energy = nn.Sequential(nn.Linear(1, 2), nn.Softplus(), nn.Linear(2, 1))
    values = (torch.tensor([[3.0], [-3.0]]), torch.ones(2), torch.ones(1, 2), torch.zeros(1))
    with torch.no_grad():
        for parameter, value in zip(energy.parameters(), values, strict=True):
            parameter.copy_(value)
    return energy


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 1))


SAMPLED = {**ENERGIES, "network": network(), "MLPEnergy": energies.MLPEnergy(3, (16, 16))}


def both(
    energy: Any, x0: Tensor, call: dict[str, Any] | None = None, **options: Any
) -> tuple[MALAOutput, MALAOutput]:
    """In one launch and step by step."""
    options = {"step_size": 0.3, **options}
    one, other = (
        MALASampler(energy, kernel=kernel, **options)(x0, key=KEY, **(call or {}))
        for kernel in (True, False)
    )
    return one, other


def assert_same(one: MALAOutput, other: MALAOutput, bound: float = 2e-5) -> None:
    assert one.key == other.key
    torch.testing.assert_close(one.x, other.x, rtol=bound, atol=bound)
    torch.testing.assert_close(one.step_size, other.step_size, rtol=bound, atol=bound)
    assert (one.trajectory is None) == (other.trajectory is None)
    if one.trajectory is not None:
        torch.testing.assert_close(one.trajectory, other.trajectory, rtol=bound, atol=bound)
    assert (one.stats is None) == (other.stats is None)
    if one.stats is not None:
        for name, value in vars(other.stats).items():
            ours = getattr(one.stats, name)
            assert ours.shape == value.shape, name
            assert ours.dtype == value.dtype, name
            torch.testing.assert_close(ours, value, rtol=10 * bound, atol=10 * bound, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAMPLED)
def test_the_same_chain_for_every_energy(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    only_where_it_runs("network" if name == "MLPEnergy" else name, dtype, device)
    energy = copy.deepcopy(SAMPLED[name]).to(device, dtype)
    x0 = starts(device).to(dtype)
    bound = 2e-5 if dtype == torch.float32 else 1e-11
    recorded = {"stats": True, "return_trajectory": True}
    for options in (
        {"n_steps": 1, **recorded}, {"n_steps": 6, "thin": 2, **recorded},
        {"n_steps": 3, "negative_energy": True, "temperature": 0.6, **recorded},
        {"n_steps": 6, "adapt_steps": 5, "step_size": 0.7, **recorded},
    ):  # fmt: skip
        assert_same(*both(energy, x0, **options), bound)


def test_what_is_given_at_the_call_and_schedules(device: torch.device) -> None:
    x0, energy = starts(device), copy.deepcopy(SAMPLED["mixture"]).to(device)
    xi = cf.ops.normal((5, 19, 3), cf.Key(8).tensor(device))
    assert_same(*both(energy, x0, {"xi": xi}, n_steps=5))
    assert_same(*both(energy, x0, n_steps=5, step_size=lambda k: 0.5 / (k + 1), stats=True))
    by_chain = torch.linspace(0.1, 0.9, 19)[None]
    assert_same(*both(energy, x0, n_steps=5, step_size=by_chain, adapt_steps=2))
    recorded = {"return_trajectory": True, "stats": True}
    assert_same(*both(energy, starts(device, 0), n_steps=2, **recorded))
    assert_same(*both(energy, x0, n_steps=0, **recorded))
    assert_same(*both(energy, starts(device, 38)[::2], n_steps=5))
    out = MALASampler(energy, n_steps=3, step_size=0.3, kernel=True)(x0.requires_grad_())
    assert not out.x.requires_grad


@pytest.mark.parametrize("kernel", [True, False])
def test_adaptation_of_one_step(kernel: bool) -> None:
    """Its mean is over that step."""
    out = MALASampler(
        ENERGIES["gaussian"], n_steps=2, step_size=0.2, adapt_steps=1, target_accept=0.5,
        stats=True, kernel=kernel,
    )(starts(), key=KEY)  # fmt: skip
    assert out.stats is not None
    expected = 0.2 * (out.stats.acceptance[0] - 0.5).exp()
    torch.testing.assert_close(out.step_size, expected)
    torch.testing.assert_close(out.stats.step_size[1], expected)


@pytest.mark.parametrize("kernel", [True, False])
def test_an_energy_of_minus_infinity_is_rejected(kernel: bool) -> None:
    """Proposals from 1e6 land where the square of x squared overflows."""
    x0 = torch.full((3, 1), 1e6)
    out = MALASampler(
        energies.DoubleWellEnergy(-1.0), n_steps=2, step_size=0.3, stats=True, kernel=kernel
    )(x0, key=KEY)
    assert out.stats is not None
    assert torch.equal(out.x, x0)
    assert not out.stats.acceptance.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e10])
def test_a_start_that_is_not_finite(device: torch.device, value: float) -> None:
    x0 = starts(device)
    x0[4, 1] = value
    errors = []
    for kernel in (True, False):
        sampler = MALASampler(ENERGIES["double well"], n_steps=3, step_size=0.1, kernel=kernel)
        with pytest.raises(cf.NonFiniteError, match=r"1 of 19 chains \(4\).* step 0") as caught:
            sampler(x0, key=KEY)
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    for error in errors:
        torch.testing.assert_close(error.x, x0, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["double well", "network"])
def test_auto_runs_the_kernel(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The energy itself is not called, and its parameters are read when the chain runs."""
    energy = copy.deepcopy(SAMPLED[name])

    def called(*args: Any) -> Tensor:
        raise AssertionError("the energy was called")

    sampler = MALASampler(energy, n_steps=3, step_size=0.3)
    before = sampler(starts(), key=KEY).x
    monkeypatch.setattr(type(energy), "forward", called)
    assert torch.equal(sampler(starts(), key=KEY).x, before)
    if name == "network":
        with torch.no_grad():
            energy[0].weight.mul_(2)  # type: ignore[operator, index]
        assert all(p.requires_grad for p in energy.parameters())
    else:
        energy.barrier_height = 3.0
    assert not torch.equal(sampler(starts(), key=KEY).x, before)
    with pytest.raises(AssertionError, match="was called"):
        MALASampler(energy, n_steps=3, step_size=0.3, kernel=False)(starts())


def test_a_call_is_one_op_and_one_read() -> None:
    sampler = MALASampler(SAMPLED["mixture"], n_steps=0, step_size=0.1)
    x0 = starts()
    with CountOps() as counted:
        sampler(x0, key=KEY)
    calls = counted.calls
    on_the_host = {"detach", "lift_fresh", "fold_in", "_local_scalar_dense"}
    launches = {name: count for name, count in calls.items() if name not in on_the_host}
    assert launches == {"analytic_mala_chain": 1, "all": 1}
    assert calls["_local_scalar_dense"] == 1


class Child(energies.DoubleWellEnergy):
    pass


REASONS: dict[str, dict[str, Any]] = {
    "energy must be one of .*, exactly": {"energy": Child()},
    "x0 must be .B, D., float32 or float64, got torch.bfloat16": {"x0": starts().bfloat16()},
    "x0 must be .B, D.*of .19, 3, 1.": {
        "x0": starts()[..., None], "energy": lambda x: x.square().flatten(1).sum(1)
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_at_the_call(reason: str) -> None:
    """With True they are raised; "auto" makes the steps one by one."""
    given = {"energy": energies.DoubleWellEnergy(), "x0": starts(), **REASONS[reason]}
    samplers = [
        MALASampler(given["energy"], n_steps=2, step_size=0.1, kernel=kernel)
        for kernel in (True, "auto", False)
    ]
    with pytest.raises(ValueError, match=f"kernel=True: .*{reason}"):
        samplers[0](given["x0"], key=KEY)
    auto, off = (sampler(given["x0"], key=KEY).x for sampler in samplers[1:])
    assert torch.equal(auto, off)
    with pytest.raises(ValueError, match="kernel must be one of True, False, 'auto'"):
        MALASampler(given["energy"], n_steps=2, step_size=0.1, kernel="yes")  # type: ignore[arg-type]


# --- law ------------------------------------------------------------------------------------------


def assert_has_law(x: Tensor, cumulative: Callable[[np.ndarray], np.ndarray]) -> None:
    """The test of Kolmogorov and Smirnov: a distance above 2.2 / sqrt(n) has probability 1e-4."""
    values = np.sort(x.double().cpu().numpy())
    n = len(values)
    exact = cumulative(values)
    distance = np.maximum(exact - np.arange(n) / n, np.arange(1, n + 1) / n - exact).max()
    assert distance * math.sqrt(n) < 2.2


def by_quadrature(energy: nn.Module, tau: float) -> Callable[[np.ndarray], np.ndarray]:
    """The distribution function of exp(−U/τ) on a line."""
    grid = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    with torch.no_grad():
        density = (-copy.deepcopy(energy).double()(grid[:, None]).flatten() / tau).exp().numpy()
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return lambda values: np.interp(values, grid.numpy(), cumulative / cumulative[-1])


ON_A_LINE = {"double well": energies.DoubleWellEnergy(1.0), "network": two_humps()}


@pytest.mark.parametrize(
    ("name", "delta", "tau"),
    [
        ("double well", 0.8, 1.0), ("double well", 0.6, 2.5), ("network", 1.0, 1.0),
        ("network", 0.8, 0.5),
    ],
)  # fmt: skip
def test_the_law_on_a_line_is_exact(
    device: torch.device, name: str, delta: float, tau: float
) -> None:
    """Step sizes of which a good part is rejected: without the acceptance it is far off."""
    energy = ON_A_LINE[name]
    x0 = 2.4 * cf.ops.uniform((20_000, 1), cf.Key(8).tensor(device)) - 1.2
    sampler = MALASampler(
        copy.deepcopy(energy).to(device), n_steps=300, step_size=delta, temperature=tau,
        stats=True, kernel=True,
    )  # fmt: skip
    out = sampler(x0, key=cf.Key(9))
    assert out.stats is not None
    assert 0.3 < out.stats.acceptance[100:].mean() < 0.97
    assert_has_law(out.x[:, 0], by_quadrature(energy, tau))


def test_the_law_of_a_gaussian_is_exact(device: torch.device) -> None:
    """Along each eigenvector of a covariance, and accepted as often as step by step."""
    root = normal(3, 3)
    covariance = root @ root.T / 3 + torch.eye(3, dtype=torch.float64)
    energy = energies.GaussianEnergy(normal(3, seed=1), covariance)
    x0 = energy.mean.float().expand(20_000, 3).contiguous().to(device)
    options = {"n_steps": 150, "step_size": 1.3, "stats": True}
    acceptance = []
    for kernel in (True, False):
        sampler = MALASampler(copy.deepcopy(energy).to(x0), kernel=kernel, **options)
        out = sampler(x0[: 20_000 if kernel else 4_000], key=cf.Key(5))
        assert out.stats is not None
        acceptance.append(out.stats.acceptance[50:].mean().item())
        if kernel:
            eigenvalues, vectors = torch.linalg.eigh(covariance)
            along = (out.x.cpu().double() - energy.mean) @ vectors / eigenvalues.sqrt()
            for coordinate in along.unbind(1):
                assert_has_law(coordinate, lambda v: torch.special.ndtr(torch.as_tensor(v)).numpy())
    assert acceptance[0] == pytest.approx(acceptance[1], abs=0.005)
    assert 0.3 < acceptance[0] < 0.9


def test_step_sizes_adapt_to_the_target(device: torch.device) -> None:
    scales = torch.linspace(0.3, 1.0, 20)
    energy = energies.GaussianEnergy(torch.zeros(20), torch.diag(scales.square())).to(device)
    x0 = (scales * cf.ops.normal((200, 20), cf.Key(1).tensor())).to(device)
    for start in (0.02, 3.0):
        out = MALASampler(
            energy, n_steps=600, step_size=start, adapt_steps=400, stats=True, kernel=True
        )(x0, key=cf.Key(2))
        assert out.stats is not None
        assert out.stats.acceptance[400:].mean().item() == pytest.approx(0.574, abs=0.05)
        assert torch.equal(out.stats.step_size[400:], out.step_size.expand(200, 200))
