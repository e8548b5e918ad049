"""LangevinSampler(kernel=…): whole chains in one launch are the chains made step by step."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import coopflow_ext as cf
from coopflow_ext import energies
from coopflow_ext.errors import NonFiniteError
from coopflow_ext.samplers import LangevinSampler
from coopflow_ext.samplers.output import SamplerOutput

KEY = cf.Key(4, time=7, chain=3)


def mixture() -> energies.GaussianMixtureEnergy:
    return energies.GaussianMixtureEnergy(
        torch.tensor([[-1.0, 0.0, 2.0], [1.5, 0.5, -1.0]]), 0.7, torch.tensor([1.0, 2.0])
    )


ENERGIES: dict[str, nn.Module] = {
    "double well": energies.DoubleWellEnergy(0.7),
    "funnel": energies.FunnelEnergy(3),
    "gaussian": energies.GaussianEnergy(torch.ones(3), torch.eye(3) + 0.5),
    "mixture": mixture(),
    "rastrigin": energies.RastriginEnergy(2.0),
    "rosenbrock": energies.RosenbrockEnergy(1.0, 3.0),
}


def starts(device: torch.device | str = "cpu", batch: int = 19) -> Tensor:
    return cf.ops.normal((batch, 3), cf.Key(7).tensor(device))


def both(
    energy: Any, x0: Tensor, call: dict[str, Any] | None = None, **options: Any
) -> tuple[SamplerOutput, SamplerOutput]:
    """In one launch and step by step."""
    options = {"drift": 0.01, "noise": 0.1, **options}
    one, other = (
        LangevinSampler(**energy, kernel=kernel, **options)(x0, key=KEY, **(call or {}))
        for kernel in (True, False)
    )
    return one, other


def assert_same(one: SamplerOutput, other: SamplerOutput, bound: float = 1e-5) -> None:
    """To rounding. A gradient is off by a few ulp of its terms, which may cancel."""
    assert one.key == other.key
    torch.testing.assert_close(one.x, other.x, rtol=bound, atol=bound)
    assert (one.trajectory is None) == (other.trajectory is None)
    if one.trajectory is not None:
        torch.testing.assert_close(one.trajectory, other.trajectory, rtol=bound, atol=bound)
    assert (one.stats is None) == (other.stats is None)
    if one.stats is not None:
        for name, value in vars(other.stats).items():
            ours = getattr(one.stats, name)
            assert (ours is None) == (value is None), name
            if value is not None:
                assert ours.dtype == value.dtype
                torch.testing.assert_close(
                    ours, value, rtol=10 * bound, atol=10 * bound, equal_nan=True
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ENERGIES)
def test_the_same_chain_for_every_energy(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    energy = copy.deepcopy(ENERGIES[name]).to(device, dtype)
    x0 = starts(device).to(dtype)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    for function in ({"energy": energy}, {"score": energy.score}):
        for options in ({"n_steps": 1}, {"n_steps": 6, "stats": True, "return_trajectory": True}):
            assert_same(*both(function, x0, **options), bound)
    climbing = both({"energy": energy}, x0, n_steps=3, negative_energy=True, stats=True)
    assert_same(*climbing, bound)


OPTIONS: dict[str, dict[str, Any]] = {
    "clips": {"grad_clip": 1.0, "grad_norm": 1.2, "step_clip": 0.02},
    "clamp": {"clamp": (-0.5, 0.5), "stats": True},
    "clamp at the end": {"clamp": (-0.5, 0.5), "clamp_when": "end", "stats": True},
    "thinned": {"return_trajectory": True, "thin": 3},
    "thinned to nothing": {"return_trajectory": True, "thin": 9},
    "no noise": {"noise": 0.0},
    "a reference": {"reference_std": 0.5},
    "a pull": {"pull": (starts(batch=19) / 2, 3.0)},
    "a pull by chain": {"pull": (starts(batch=19) / 2, [0.1 * i for i in range(19)])},
    "a schedule": {"drift": lambda k: 0.01 / (k + 1), "noise": [0.1, 0.2, 0.3, 0.1, 0.0, 0.1, 0.2]},
    "by chain": {"drift": torch.linspace(0.01, 0.02, 19)[None], "temperature": 0.5, "noise": None},
    "ignore": {"on_nonfinite": "ignore"},
    "freeze": {"on_nonfinite": "freeze"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_chain_for_every_option(device: torch.device, name: str) -> None:
    options = OPTIONS[name]
    if "pull" in options:
        options = options | {"pull": (options["pull"][0].to(device), options["pull"][1])}
    assert_same(
        *both({"energy": ENERGIES["mixture"].to(device)}, starts(device), n_steps=7, **options)
    )


def test_what_is_given_at_the_call(device: torch.device) -> None:
    x0, energy = starts(device), {"energy": ENERGIES["double well"]}
    xi = cf.ops.normal((5, 19, 3), cf.Key(8).tensor(device))
    assert_same(*both(energy, x0, {"xi": xi}, n_steps=5))
    assert_same(*both(energy, x0, {"x_ref": x0 * 2}, n_steps=5, pull=(None, 1.0)))
    empty, no_steps = starts(device, 0), {"n_steps": 0, "return_trajectory": True, "stats": True}
    assert_same(*both(energy, empty, n_steps=2, return_trajectory=True, stats=True))
    assert_same(*both(energy, x0, **no_steps))
    strided = starts(device, 38)[::2]
    assert_same(*both(energy, strided, n_steps=5))
    out = LangevinSampler(**energy, n_steps=3, step_size=0.1, kernel=True)(x0.requires_grad_())
    assert not out.x.requires_grad


def test_long_chains_agree_in_law() -> None:
    """Rounding makes them other chains in the end, of the same law."""
    x0 = torch.zeros(4000, 3)
    for name in ("double well", "mixture"):
        one, other = both({"energy": ENERGIES[name]}, x0, n_steps=300, drift=0.02, noise=0.2)
        for moment in (1, 2):
            a, b = one.x.pow(moment), other.x.pow(moment)
            error = 5 * (a.var(0) / len(a) * 2).sqrt()
            assert ((a.mean(0) - b.mean(0)).abs() < error).all()


@pytest.mark.parametrize("on_nonfinite", ["raise", "freeze", "ignore"])
def test_gradients_that_are_not_finite(device: torch.device, on_nonfinite: str) -> None:
    x0 = starts(device)
    x0[4], x0[9] = 40.0, math.nan
    options: dict[str, Any] = {"n_steps": 30, "drift": 0.05, "noise": 0.1, "stats": True}
    samplers = [
        LangevinSampler(
            ENERGIES["double well"], kernel=kernel, on_nonfinite=on_nonfinite, **options
        )
        for kernel in (True, False)
    ]
    if on_nonfinite == "raise":
        errors = []
        for sampler in samplers:
            with pytest.raises(NonFiniteError, match="2 of 19 chains") as found:
                sampler(x0, key=KEY)
            errors.append(found.value)
        assert str(errors[0]) == str(errors[1])
        assert errors[0].step == errors[1].step == 0
        assert torch.equal(errors[0].chains, errors[1].chains)
        torch.testing.assert_close(errors[0].x, errors[1].x, rtol=1e-4, atol=1e-4, equal_nan=True)
        return
    one, other = (sampler(x0, key=KEY) for sampler in samplers)
    torch.testing.assert_close(one.x, other.x, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert torch.equal(one.stats.nonfinite, other.stats.nonfinite)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_parameter_that_is_not_a_number(device: torch.device, kernel: bool) -> None:
    energy = mixture().to(device)
    energy.means[1, 2] = math.nan
    sampler = LangevinSampler(energy, n_steps=3, step_size=0.1, kernel=kernel)
    with pytest.raises(NonFiniteError, match=r"19 of 19 chains .*, first at step 0") as found:
        sampler(starts(device))
    assert found.value.chains.tolist() == list(range(19))


@pytest.mark.parametrize("name", ENERGIES)
def test_auto_runs_the_kernel(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The energy itself is not called, and its tensors are read when the chain runs."""
    energy = copy.deepcopy(ENERGIES[name])

    def called(*args: Any) -> Tensor:
        raise AssertionError("the energy was called")

    sampler = LangevinSampler(energy, n_steps=3, step_size=0.1)
    before = sampler(starts(), key=KEY).x
    monkeypatch.setattr(type(energy), "forward", called)
    assert torch.equal(sampler(starts(), key=KEY).x, before)
    for buffer in energy.buffers():
        buffer.mul_(1.5)
    if name == "double well":
        energy.barrier_height = 3.0
    if list(energy.buffers()) or name == "double well":
        assert not torch.equal(sampler(starts(), key=KEY).x, before)
    with pytest.raises(AssertionError, match="was called"):
        LangevinSampler(energy, n_steps=3, step_size=0.1, kernel=False)(starts())


def test_a_sampler_can_be_copied() -> None:
    sampler = LangevinSampler(mixture(), n_steps=3, step_size=0.1, kernel=True)
    expected = sampler(starts(), key=KEY).x
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(other(starts(), key=KEY).x, expected)


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", ["energy", "score"])
def test_a_call_is_four_launches_and_one_read(function: str) -> None:
    """On a device three set the key's numbers; the mask is copied to the host and read there."""
    energy = mixture()
    sampler = LangevinSampler(
        **{function: energy if function == "energy" else energy.score}, n_steps=0, step_size=0.1
    )
    x0 = starts()
    with CountOps() as counted:
        KEY.tensor("meta")
    assert sum(counted.calls[name] for name in ("full", "fill_")) == 3
    with CountOps() as counted:
        sampler(x0, key=KEY)
    calls = counted.calls
    on_the_host = {"detach", "lift_fresh", "min", "_local_scalar_dense"}
    launches = {name: count for name, count in calls.items() if name not in on_the_host}
    assert launches == {"analytic_langevin_chain": 1}
    assert calls["_local_scalar_dense"] == 1


# --- what stands in the way -----------------------------------------------------------------------


class Child(energies.DoubleWellEnergy):
    pass


class OwnTensor(Tensor):
    pass


def with_hook() -> nn.Module:
    energy = energies.DoubleWellEnergy()
    energy.register_forward_hook(lambda *args: None)
    return energy


def with_own_forward() -> nn.Module:
    energy = energies.DoubleWellEnergy()
    energy.forward = lambda x: x.square().sum(1)  # type: ignore[method-assign]
    return energy


def with_tensor_number() -> nn.Module:
    energy = energies.DoubleWellEnergy()
    energy.barrier_height = nn.Parameter(torch.tensor(1.0))  # type: ignore[assignment]
    return energy


def with_infinite_number() -> nn.Module:
    energy = energies.DoubleWellEnergy()
    energy.barrier_height = math.inf
    return energy


def with_own_score() -> nn.Module:
    energy = energies.DoubleWellEnergy()
    energy.score = lambda x: -x  # type: ignore[method-assign]
    return energy


WELL = energies.DoubleWellEnergy()
AT_ONCE: dict[str, dict[str, Any]] = {
    "compile=True": {"energy": WELL, "compile": True},
    "differentiable=True": {"energy": WELL, "differentiable": True},
    "differentiable='last'": {"energy": WELL, "differentiable": "last"},
    "noise_before_gradient=True": {"energy": WELL, "noise_before_gradient": True},
    "channels_last=True": {"energy": WELL, "channels_last": True},
}
AT_THE_CALL: dict[str, dict[str, Any]] = {
    "energy must be one of DoubleWellEnergy": {"energy": lambda x: x.square().sum(1)},
    "energy must be one of .*, exactly": {"energy": Child()},
    "score must be one of .*, exactly, by its method score": {"score": Child().score},
    "score must be one of .* by its method score": {"score": torch.neg},
    "score must be the method score": {"score": WELL.forward, "runs": False},
    "DoubleWellEnergy has hooks": {"energy": with_hook()},
    "DoubleWellEnergy has a forward or score of its own": {"energy": with_own_forward()},
    "score must be one of": {"score": with_own_score().score},
    "barrier_height must be a finite number": {"energy": with_tensor_number()},
    "barrier_height must be a finite number, got inf": {
        "energy": with_infinite_number(), "on_nonfinite": "freeze"
    },
    "autocast is for networks": {"energy": WELL, "autocast": torch.bfloat16},
    "means must have x0's dtype and device": {"energy": mixture().double()},
    "x0 must be one tensor": {"energy": lambda x: x[0].square().sum(1), "x0": [starts()]},
    "x0 must be a plain tensor": {"energy": WELL, "x0": starts().as_subclass(OwnTensor)},
    "x0 must be .B, D., float32 or float64, got torch.bfloat16": {
        "energy": WELL, "x0": starts().bfloat16()
    },
    "x0 must be .B, D.*of .19, 3, 1.": {"energy": torch.nn.Flatten(0), "x0": starts()[..., None],
                                        "runs": False},
    "it takes no model_kwargs": {"energy": WELL, "model_kwargs": {"y": 1}, "runs": False},
    "x0 does not fit the energy, got .19, 3.": {"energy": energies.FunnelEnergy(4), "runs": False},
    "x0 does not fit the energy, got .19, 1.": {"energy": energies.RosenbrockEnergy(),
                                                "x0": starts()[:, :1], "runs": False},
}  # fmt: skip


@pytest.mark.parametrize("reason", AT_ONCE)
def test_options_that_no_kernel_has(reason: str) -> None:
    options = {"n_steps": 2, "step_size": 0.1, **AT_ONCE[reason]}
    with pytest.raises(ValueError, match=f"kernel=True: .*{reason}"):
        LangevinSampler(**options, kernel=True)
    LangevinSampler(**options)


@pytest.mark.parametrize("reason", AT_THE_CALL)
def test_reasons_at_the_call(reason: str) -> None:
    """With True they are raised; "auto" makes the steps one by one."""
    options = {"n_steps": 2, "step_size": 0.1, **AT_THE_CALL[reason]}
    x0, runs = options.pop("x0", starts()), options.pop("runs", True)
    call = {"key": KEY, "model_kwargs": options.pop("model_kwargs", None)}
    with pytest.raises(ValueError, match=f"kernel=True: .*{reason}"):
        LangevinSampler(**options, kernel=True)(x0, **call)
    auto, off = LangevinSampler(**options), LangevinSampler(**options, kernel=False)
    if not runs:
        with pytest.raises((ValueError, TypeError)) as found:
            auto(x0, **call)
        assert "kernel" not in str(found.value)
        return
    ours, theirs = auto(x0, **call).x, off(x0, **call).x
    for one, other in zip(
        *((t,) if isinstance(t, Tensor) else t for t in (ours, theirs)), strict=True
    ):
        assert torch.equal(one, other)


def test_under_autocast_steps_are_made_one_by_one() -> None:
    energy = ENERGIES["gaussian"]
    sampler = LangevinSampler(energy, n_steps=2, step_size=0.1, kernel=True)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="autocast is on"),
    ):
        sampler(starts())


def test_bad_values_of_the_option() -> None:
    for kernel in ("yes", None, 2):
        with pytest.raises(ValueError, match="kernel must be one of True, False, 'auto'"):
            LangevinSampler(WELL, n_steps=1, step_size=0.1, kernel=kernel)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_cuda_a_chain_that_no_thread_can_hold_goes_step_by_step() -> None:
    x0 = torch.zeros(3, cf.ops.MOST_ELEMENTS_ON_CUDA + 1, device="cuda")
    LangevinSampler(WELL, n_steps=2, step_size=0.1)(x0)
    with pytest.raises(ValueError, match="D ≤ 64 on CUDA"):
        LangevinSampler(WELL, n_steps=2, step_size=0.1, kernel=True)(x0)


def test_hooks_of_all_modules_are_in_the_way() -> None:
    energy, x0 = energies.MLPEnergy(2, (8,)), torch.randn(3, 2)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: 2 * out)
    try:
        with pytest.raises(ValueError, match="torch has hooks for all modules"):
            LangevinSampler(energy, n_steps=1, step_size=0.1, kernel=True)(x0)
    finally:
        hook.remove()
    LangevinSampler(energy, n_steps=1, step_size=0.1, kernel=True)(x0)


@pytest.mark.parametrize("kernel", [True, False])
def test_constants_may_require_grad(kernel: bool) -> None:
    """A flow's samples as the centre, say; x0's graph ends at the sampler too."""
    options = {"n_steps": 2, "step_size": 0.1, "pull": (None, 0.5), "kernel": kernel}
    sampler, x0 = LangevinSampler(energies.DoubleWellEnergy(), **options), starts()
    x_ref, xi = torch.rand_like(x0), torch.randn(2, *x0.shape)
    expected = sampler(x0, x_ref=x_ref, xi=xi).x
    given = [t.clone().requires_grad_() for t in (x0, x_ref, xi)]
    found = sampler(given[0], x_ref=given[1], xi=given[2]).x
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("make", [LangevinSampler, cf.MALASampler])
@pytest.mark.parametrize("end", [nn.Softplus(), nn.Tanh(), nn.SiLU()])
def test_an_activation_behind_the_last_layer_is_no_kernels(make: Any, end: nn.Module) -> None:
    energy = nn.Sequential(nn.Linear(3, 8), type(end)(), nn.Linear(8, 1), end)
    options, x0 = {"n_steps": 3, "step_size": 0.3}, starts()
    with pytest.raises(ValueError, match=r"kernel=True: .*end with a Linear"):
        make(energy, **options, kernel=True)(x0, key=KEY)
    found, expected = (make(energy, **options, kernel=k)(x0, key=KEY).x for k in ("auto", False))
    assert torch.equal(found, expected)


def test_no_steps_of_a_sampler_with_a_table():
    energy = energies.GaussianEnergy(torch.zeros(2), torch.eye(2))
    x0 = torch.ones(4, 2)
    for kernel in (True, False):
        sampler = cf.LangevinSampler(energy, n_steps=3, drift=[0.1, 0.2, 0.3], kernel=kernel)
        assert torch.equal(sampler(x0, n_steps=0).x, x0)
