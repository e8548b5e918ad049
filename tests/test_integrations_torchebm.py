"""torchebm's sampler interface, beside torchebm itself."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import re
import sys

import pytest
import torch
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext import integrations
from coopflow_ext.energies import MLPEnergy
from coopflow_ext.integrations.torchebm import LangevinDynamics, _device_of


@pytest.fixture
def torchebm():
    return pytest.importorskip("torchebm")


class Quadratic(nn.Module):
    """An energy that torchebm refuses: a plain module, with (B, 1) values."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        centre = 0 if y is None else y
        return 0.5 * (x - centre).square().sum(1, keepdim=True)


def theirs(torchebm):
    from torchebm.samplers import LangevinDynamics as Theirs

    return Theirs


def test_arguments_are_torchebms(torchebm):
    """Every argument of theirs, in their order and with their defaults, comes first in ours."""
    for name in ("__init__", "sample"):
        a = inspect.signature(getattr(theirs(torchebm), name)).parameters
        b = inspect.signature(getattr(LangevinDynamics, name)).parameters
        assert list(b)[: len(a)] == list(a)
        assert [b[k].default for k in a] == [p.default for p in a.values()]
        assert [b[k].kind for k in a] == [p.kind for p in a.values()]


@pytest.mark.parametrize("scheduled", [False, True])
def test_same_path_without_noise_as_torchebm(torchebm, scheduled):
    from torchebm.core import DoubleWellModel, LinearScheduler

    x0 = torch.randn(16, 2)
    paths = []
    for cls in (theirs(torchebm), LangevinDynamics):
        step = LinearScheduler(0.05, 0.001, n_steps=10) if scheduled else 0.01
        sampler = cls(DoubleWellModel(), step_size=step, noise_scale=1e-20, clamp=(-1.2, 1.2))
        paths.append(sampler.sample(x0, n_steps=20, thin=3, return_trajectory=True))
    assert paths[0].shape == paths[1].shape == (16, 6, 2)
    torch.testing.assert_close(*paths)


def test_same_noise_scale_as_torchebm(torchebm):
    """One step from zero: N(0, 2η·noise_scale²) in both, with a scheduled noise in one."""
    from torchebm.core import ExponentialDecayScheduler

    n, eta = 40_000, 0.02
    noise = ExponentialDecayScheduler(0.5, 0.9)
    for cls in (theirs(torchebm), LangevinDynamics):
        sampler = cls(_torchebm_quadratic(), step_size=eta, noise_scale=noise)
        x = sampler.sample(torch.zeros(n, 1), n_steps=1)
        assert x.var().item() == pytest.approx(2 * eta * 0.25, rel=5 * (2 / n) ** 0.5)


def _torchebm_quadratic():
    from torchebm.core import BaseModel

    class Model(BaseModel):
        def forward(self, x):
            return 0.5 * x.square().flatten(1).sum(1)

    return Model()


def test_diagnostics_have_torchebms_keys_and_shapes(torchebm):
    x0 = torch.randn(8, 2)
    options = {"n_steps": 10, "thin": 3, "return_diagnostics": True}
    results = [
        cls(_torchebm_quadratic(), step_size=0.05, noise_scale=1e-20).sample(x0, **options)
        for cls in (theirs(torchebm), LangevinDynamics)
    ]
    (x_a, a), (x_b, b) = results
    torch.testing.assert_close(x_a, x_b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_a_models_own_gradient_is_used(torchebm):
    from torchebm.core import BaseModel

    class Model(BaseModel):
        calls = 0

        def forward(self, x):
            raise AssertionError("the closed form is there")

        def gradient(self, x):
            type(self).calls += 1
            return x

    x = LangevinDynamics(Model(), noise_scale=1e-20, step_size=0.1).sample(torch.ones(3, 2))
    assert Model.calls == 100
    torch.testing.assert_close(x, torch.full((3, 2), 0.9**100))


def test_schedulers_are_reset_or_carried_on(torchebm):
    from torchebm.core import LinearScheduler

    scheduler = LinearScheduler(0.1, 0.01, n_steps=100)
    sampler = LangevinDynamics(Quadratic(), step_size=scheduler)
    sampler.sample(dim=2, n_steps=10)
    assert scheduler.step_count == 10
    sampler.sample(dim=2, n_steps=10)
    assert scheduler.step_count == 10
    sampler.sample(dim=2, n_steps=10, reset_schedulers=False)
    assert scheduler.step_count == 20


@pytest.mark.parametrize("n_steps", [0, 7])
def test_one_scheduler_for_both_goes_on_as_in_torchebm(torchebm, n_steps):
    from torchebm.core import LinearScheduler

    counts = []
    for cls in (theirs(torchebm), LangevinDynamics):
        scheduler = LinearScheduler(0.05, 0.001, n_steps=30)
        sampler = cls(_torchebm_quadratic(), step_size=scheduler, noise_scale=scheduler)
        sampler.sample(dim=2, n_steps=n_steps)
        counts.append((scheduler.step_count, scheduler.get_value()))
    assert counts[0] == counts[1]


def test_every_kind_of_start_gives_torchebms_shape(torchebm):
    calls = [
        {"dim": 2},
        {"dim": (2, 3)},
        {"dim": 2, "n_samples": 0},
        {"dim": 2, "n_steps": 0},
        {"x": torch.ones(3, 2).long()},
        {"dim": 2, "n_steps": 3, "thin": 5, "return_trajectory": True},
        {"dim": 2, "n_steps": 4, "thin": 2, "n_samples": 3, "return_trajectory": True},
    ]
    for call in calls:
        a, b = (
            cls(_torchebm_quadratic(), step_size=torch.tensor(0.01)).sample(**call)
            for cls in (theirs(torchebm), LangevinDynamics)
        )
        assert a.shape == b.shape
        assert a.dtype == b.dtype


def test_plain_modules_generators_and_conditions():
    sampler = LangevinDynamics(Quadratic(), step_size=0.1)
    draws = [
        sampler.sample(dim=(3,), n_samples=5, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert draws[0].shape == (5, 3)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    quiet = LangevinDynamics(Quadratic(), step_size=0.1, noise_scale=1e-20)
    y = torch.full((4, 3), 2.0)
    torch.testing.assert_close(quiet.sample(torch.zeros(4, 3), n_steps=200, y=y), y)
    torch.manual_seed(3)
    a = sampler.sample(torch.zeros(2, 3))
    torch.manual_seed(3)
    assert torch.equal(sampler.sample(torch.zeros(2, 3)), a)
    network = LangevinDynamics(MLPEnergy(3).double(), dtype=torch.float64)
    assert network.sample(dim=3).dtype == torch.float64
    assert all(p.requires_grad for p in network.model.parameters())


def test_what_is_not_honoured_is_refused(torchebm):
    from torchebm.integrators import EulerMaruyamaIntegrator, HeunIntegrator

    LangevinDynamics(Quadratic(), integrator="euler_maruyama")
    LangevinDynamics(Quadratic(), integrator=EulerMaruyamaIntegrator())
    for integrator in ("heun", HeunIntegrator()):
        with pytest.raises(ValueError, match=r"integrator must be Euler-Maruyama, got [hH]eun"):
            LangevinDynamics(Quadratic(), integrator=integrator)
    with pytest.raises(ValueError, match="decay"):
        LangevinDynamics(Quadratic(), decay=0.1)
    with pytest.raises(ValueError, match="step_size"):
        LangevinDynamics(Quadratic(), step_size=0.0)
    with pytest.raises(TypeError, match="noise_scale"):
        LangevinDynamics(Quadratic(), noise_scale="high")
    with pytest.raises(ValueError, match="clamp min"):
        LangevinDynamics(Quadratic(), clamp=(1, 0))
    with pytest.raises(TypeError, match="clamp must be a pair"):
        LangevinDynamics(Quadratic(), clamp=1.0)
    with pytest.raises(TypeError, match="model must be callable, got int"):
        LangevinDynamics(3)
    with pytest.raises(TypeError, match="grad_clp"):
        LangevinDynamics(Quadratic(), grad_clp=1.0)
    sampler = LangevinDynamics(Quadratic())
    for call, error, match in (
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"dim": -1}, ValueError, "dim must be ≥ 0"),
        ({"dim": "2"}, TypeError, "dim must be an int"),
        ({"dim": 2, "n_samples": -1}, ValueError, "n_samples must be ≥ 0"),
        ({"dim": 2, "n_steps": 1.5}, TypeError, "n_steps must be an int"),
        ({"dim": 2, "generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"dim": 2, "model_kwargs": 3}, TypeError, "model_kwargs must be a mapping"),
        ({"dim": 2, "reset_schedulers": "no"}, TypeError, "reset_schedulers must be True or"),
        ({"dim": 2, "return_diagnostics": 1}, TypeError, "return_diagnostics must be True or"),
    ):
        with pytest.raises(error, match=match):
            sampler.sample(**call)
    with pytest.raises(ValueError, match="dim must be provided"):
        sampler.sample()
    with pytest.raises(ValueError, match="thin"):
        sampler.sample(dim=2, thin=0)
    with pytest.raises(ValueError, match="y was passed both"):
        sampler.sample(dim=2, y=torch.zeros(1, 2), model_kwargs={"y": 1})


# What a torchebm sampler has beside its constructor and sample().


def counted(torchebm):
    """A scheduler whose value tells its step: 0.10, 0.09, 0.08, …"""
    from torchebm.core import LinearScheduler

    return LinearScheduler(0.1, 0.0, n_steps=10)


def scheduled_models(torchebm) -> dict:
    """Models whose force follows a scheduler, each with the arguments of a sampler of it."""
    from torchebm.core import BaseModel, Schedulable

    class Read(BaseModel):
        def __init__(self, scheduler) -> None:
            super().__init__()
            self.read = [scheduler]

        def forward(self, x: Tensor) -> Tensor:
            return self.read[0].get_value() * x.square().sum(1)

    class Own(Schedulable, BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.register_scheduler("force", counted(torchebm))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_scheduled_value("force") * x.square().sum(1)

    shared, registered = counted(torchebm), counted(torchebm)

    class Closure(BaseModel):
        def forward(self, x: Tensor) -> Tensor:
            return registered.get_value() * x.square().sum(1)

    return {
        "a scheduler of its own": (Own(), {}, {}),
        "one of a part": (nn.Sequential(Own()), {}, {}),
        "that of the step size": (Read(shared), {"step_size": shared}, {}),
        "one that is registered": (Closure(), {}, {"force": registered}),
        "its own and a scheduled step": (Own(), {"step_size": counted(torchebm)}, {}),
    }


@pytest.mark.parametrize("index", range(5))
def test_a_model_that_is_scheduled_moves_on_as_in_torchebm(torchebm, index):
    x0 = torch.randn(4, 2)
    results, counts = [], []
    for cls in (theirs(torchebm), LangevinDynamics):
        model, options, registered = list(scheduled_models(torchebm).values())[index]
        if not hasattr(model, "gradient"):
            model.gradient = model[0].gradient
        sampler = cls(model, **{"step_size": 0.5, "noise_scale": 1e-20, **options})
        for name, scheduler in registered.items():
            sampler.register_scheduler(name, scheduler)
        paths = [
            sampler.sample(x0, n_steps=7, thin=2, return_trajectory=True, return_diagnostics=True,
                           reset_schedulers=reset)
            for reset in (True, False)
        ]  # fmt: skip
        results.append(paths)
        found = []
        sampler.apply(lambda m, found=found: found.extend(vars(m).get("schedulers", {}).values()))
        counts.append([scheduler.step_count for scheduler in found])
    for (x, a), (y, b) in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name])
    assert not torch.allclose(results[0][0][0], results[0][1][0])  # the second call went on
    assert counts[0] == counts[1]


def test_a_function_beside_a_scheduled_step_is_not_taken_for_constant(torchebm):
    scheduler = counted(torchebm)
    sampler = LangevinDynamics(
        lambda x: scheduler.get_value() * x.square().sum(1), step_size=scheduler, noise_scale=1e-20
    )
    expected = torch.ones(1)
    for k in range(4):
        expected = expected - (0.1 - 0.01 * k) * 2 * (0.1 - 0.01 * k) * expected
    x = sampler.sample(torch.ones(3, 2), n_steps=4)
    torch.testing.assert_close(x, expected.expand(3, 2))


def test_steps_run_one_at_a_time_only_where_the_model_may_change(torchebm, monkeypatch):
    """Both ways make the same samples from the same seed."""
    from torchebm.core import LinearScheduler

    from coopflow_ext.integrations import torchebm as module

    made = []

    class Recorded(module.LangevinSampler):
        def __init__(self, *args, **options) -> None:
            made.append(options["n_steps"])
            super().__init__(*args, **options)

    monkeypatch.setattr(module, "LangevinSampler", Recorded)
    samples = []
    for extra in (False, True):
        sampler = LangevinDynamics(Quadratic(), LinearScheduler(0.05, 0.001, n_steps=10), 0.7)
        if extra:
            sampler.register_scheduler("other", counted(torchebm))
        made.clear()
        x = torch.ones(5, 3)
        call = {"n_steps": 6, "generator": torch.Generator().manual_seed(3)}
        samples.append(sampler.sample(x, return_trajectory=True, **call))
        assert made == ([1] * 6 if extra else [6])
        assert x.eq(1).all()
    assert torch.equal(*samples)
    nothing = sampler.sample(x, n_steps=0)
    assert torch.equal(nothing, x)
    assert nothing is not x
    for name in ("cuda_graph", "compile"):
        sampler = LangevinDynamics(Quadratic(), **{name: True})
        sampler.register_scheduler("other", counted(torchebm))
        with pytest.raises(ValueError, match=f"{name}=True: the model's schedulers change it"):
            sampler.sample(x)


def test_a_chain_that_blows_up_names_its_step(torchebm):
    def energy(x: Tensor) -> Tensor:  # one unit a step, until the slope at 4 is not finite
        return (x * torch.where(x.detach() < 3.5, -1.0, torch.nan)).sum(1)

    for registered in ({}, {"other": counted(torchebm)}):
        sampler = LangevinDynamics(energy, step_size=1.0, noise_scale=1e-20)
        for name, scheduler in registered.items():
            sampler.register_scheduler(name, scheduler)
        with pytest.raises(cf.NonFiniteError) as caught:
            sampler.sample(torch.ones(2, 1), n_steps=9)
        assert caught.value.step == 3
        assert ("step 3 of the call" in str(caught.value)) == bool(registered)
        torch.testing.assert_close(caught.value.x, torch.full((2, 1), 4.0))


def test_attributes_set_between_calls_count():
    x = torch.full((4, 2), 2.0)
    model = Quadratic()
    sampler = LangevinDynamics(model, step_size=0.1, noise_scale=1e-20)

    def end() -> Tensor:
        return sampler.sample(x, n_steps=3)

    torch.testing.assert_close(end(), 2 * 0.9**3 * torch.ones(4, 2))
    sampler.clamp = (-1.7, 1.5)
    torch.testing.assert_close(end(), 1.5 * 0.9**2 * torch.ones(4, 2))
    sampler.clamp = None
    sampler.step_size = 0.2
    assert sampler.step_size == sampler.get_scheduled_value("step_size") == 0.2
    torch.testing.assert_close(end(), 2 * 0.8**3 * torch.ones(4, 2))
    sampler.model = MLPEnergy(2)
    assert not torch.allclose(end(), 2 * 0.8**3 * torch.ones(4, 2))
    sampler.model = model
    torch.testing.assert_close(end(), 2 * 0.8**3 * torch.ones(4, 2))
    sampler.noise_scale = 5.0
    assert end().std() > 1
    sampler.dtype = torch.float64
    assert sampler.dtype == end().dtype == torch.float64
    sampler.device = "meta"
    assert sampler.device == torch.device("meta")
    sampler = LangevinDynamics(model)
    for name, value, error, match in (
        ("clamp", (1, 0), ValueError, "clamp min must be < max"),
        ("clamp", 1.0, TypeError, "clamp must be a pair"),
        ("step_size", 0.0, ValueError, "step_size must be positive"),
        ("noise_scale", "much", TypeError, "noise_scale must be a number"),
        ("step_size", torch.ones((), requires_grad=True), ValueError, "step_size must not require"),
    ):
        with pytest.raises(error, match=match):
            setattr(sampler, name, value)
    sampler.decay = 0.1
    with pytest.raises(ValueError, match="decay is not supported"):
        sampler.sample(x)


def test_it_is_one_of_torchebms_samplers(torchebm):
    from torchebm.core import BaseSampler, DoubleWellModel, LinearScheduler
    from torchebm.losses import ContrastiveDivergence

    net = nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 1))
    a, b = (cls(net, step_size=0.1) for cls in (theirs(torchebm), LangevinDynamics))
    assert isinstance(b, BaseSampler)
    public = {name for name in dir(a) if not name.startswith("_")}
    assert public <= set(dir(b))
    assert b.state_dict().keys() == a.state_dict().keys()
    assert repr(b) == repr(a)
    assert type(b.integrator) is type(a.integrator)
    assert b.get_schedulers().keys() == a.get_schedulers().keys()
    with pytest.raises(KeyError, match="No scheduler registered for parameter 'other'"):
        b.get_scheduled_value("other")
    assert b.to(torch.float64) is b
    assert b.sample(dim=2, n_steps=1).dtype == torch.float64
    assert next(net.parameters()).dtype == torch.float64

    model = DoubleWellModel()
    sampler = LangevinDynamics(model, step_size=LinearScheduler(0.1, 0.0, n_steps=10))
    ContrastiveDivergence(model=model, sampler=sampler, k_steps=2).step_schedulers()
    assert sampler.step_size == pytest.approx(0.09)


def test_checks_of_the_arguments_are_torchebms(torchebm):
    from torchebm.integrators import EulerMaruyamaIntegrator, LeapfrogIntegrator

    def run(cls, call, options) -> None:
        sampler = cls(_torchebm_quadratic(), **options)
        sampler.sample(**{"dim": 2, "n_steps": 2, **call})

    def check(call, options) -> None:
        with pytest.raises((ValueError, TypeError)) as expected:
            run(theirs(torchebm), call, options)
        with pytest.raises(expected.type, match="^" + re.escape(str(expected.value))):
            run(LangevinDynamics, call, options)

    for options in (
        {"step_size": 0.0},
        {"step_size": -0.1},
        {"noise_scale": -1.0},
        {"clamp": (1.0, -1.0)},
        {"integrator": "nope"},
        {"integrator": 3},
        {"integrator": "leapfrog"},
        {"integrator": LeapfrogIntegrator()},
        {"integrator": EulerMaruyamaIntegrator(dtype=torch.float64)},
    ):
        check({}, options)
    for call in (
        {"thin": 0},
        {"dim": None},
        {"y": torch.ones(1), "model_kwargs": {"y": torch.ones(1)}},
    ):
        check(call, {})


def test_mixed_precision_as_in_torchebm(torchebm):
    seen = []

    class Model(_torchebm_quadratic().__class__):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    sampler = LangevinDynamics(Model())
    with pytest.warns(UserWarning, match="Mixed precision requested but device is cpu"):
        sampler.setup_mixed_precision(True)  # they have it on CUDA alone
    sampler.sample(dim=2, n_steps=2)
    sampler.use_mixed_precision = sampler.autocast_available = True
    sampler._amp_dtype = torch.bfloat16
    sampler.sample(dim=2, n_steps=2)
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("flag", ["force_fp32_gradient", "use_mixed_precision"])
def test_the_precision_of_a_models_own_gradient(torchebm, flag):
    """Both flags act in the gradient of their models alone."""
    dtypes = []

    class Model(_torchebm_quadratic().__class__):
        def forward(self, x: Tensor) -> Tensor:
            dtypes.append(x.dtype)
            return super().forward(x)

        def autocast_context(self):
            dtypes.append("asked for autocast")
            return super().autocast_context()

    model = Model()
    sampler = LangevinDynamics(model, dtype=torch.float64)
    sampler.sample(dim=2, n_steps=1)
    assert dtypes == [torch.float64]
    setattr(model, flag, True)
    sampler.sample(dim=2, n_steps=1)
    low = torch.float32 if flag == "force_fp32_gradient" else torch.float64
    assert dtypes[1:] == ["asked for autocast", low]


def test_copies_and_pickles_of_the_sampler(torchebm):
    sampler = LangevinDynamics(MLPEnergy(3), step_size=0.1)

    def end(sampler) -> Tensor:
        return sampler.sample(torch.ones(2, 3), generator=torch.Generator().manual_seed(0))

    expected = end(sampler)
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(end(other), expected)
        with torch.no_grad():
            next(other.model.parameters()).add_(1.0)
        assert not torch.equal(end(other), expected)
    assert torch.equal(end(sampler), expected)


def test_without_torchebm(monkeypatch):
    """The same numbers, from a module that found no torchebm."""

    class Falling:
        """A scheduler by its methods."""

        def __init__(self) -> None:
            self.reset()

        def get_value(self) -> float:
            return 0.1 / (1 + self.steps)

        def step(self) -> float:
            self.steps += 1
            return self.get_value()

        def reset(self) -> None:
            self.steps = 0

    def samples(cls) -> tuple:
        net = MLPEnergy(3)
        net.load_state_dict(state)
        sampler = cls(net, step_size=Falling(), clamp=(-1, 1))
        call = {"generator": torch.Generator().manual_seed(0), "return_diagnostics": True}
        out, diagnostics = sampler.sample(dim=3, n_samples=4, n_steps=6, **call)
        other = cls(Quadratic(), step_size=0.2).sample(
            torch.ones(2, 3), n_steps=4, generator=torch.Generator().manual_seed(1)
        )
        return out, diagnostics, other, sampler.step_size

    state = MLPEnergy(3).state_dict()
    expected = samples(LangevinDynamics)
    parts = [f"{integrations.__name__}.{name}" for name in ("_torchebm_base", "torchebm")]
    for name in parts:
        monkeypatch.setattr(integrations, name.rpartition(".")[2], sys.modules[name])
        monkeypatch.delitem(sys.modules, name)
    for name in ("torchebm", "torchebm.core", "torchebm.integrators"):
        monkeypatch.setitem(sys.modules, name, None)
    alone = importlib.import_module(parts[1]).LangevinDynamics
    assert alone.__mro__[1].__module__ == parts[0]

    torch.testing.assert_close(samples(alone), expected, rtol=0, atol=0)
    sampler = alone(Quadratic(), integrator="euler")
    assert sampler.to(torch.float64).sample(dim=2, n_steps=1).dtype == torch.float64
    sampler.register_scheduler("other", Falling())
    assert sampler.sample(dim=2, n_steps=3).shape == (1, 2)
    assert sampler.get_schedulers()["other"].steps == 3
    with pytest.raises(ValueError, match="integrator must be Euler-Maruyama, got heun"):
        alone(Quadratic(), integrator="heun")


def test_keys_do_not_leak_between_calls():
    """Two calls without a generator give different samples."""
    sampler = LangevinDynamics(Quadratic(), step_size=0.1)
    x0 = torch.zeros(2, 3)
    assert not torch.equal(sampler.sample(x0), sampler.sample(x0))


class Falling:
    """A scheduler by its methods: 0.5, 0.25, …"""

    def __init__(self) -> None:
        self.reset()

    def get_value(self) -> float:
        return 0.5 ** (1 + self.steps)

    def step(self) -> float:
        self.steps += 1
        return self.get_value()

    def reset(self) -> None:
        self.steps = 0


def test_the_chains_that_are_kept_are_the_last_ones_used():
    sampler, x = LangevinDynamics(Quadratic(), noise_scale=1e-20), torch.ones(2, 3)

    def used(n_steps: int):
        sampler.sample(x, n_steps=n_steps)
        return next(reversed(sampler._samplers.values()))[1]

    first, second = used(1), used(2)
    for n_steps in range(3, 5):
        used(n_steps)
    assert used(1) is first
    used(5)
    assert len(sampler._samplers) == 4
    assert used(1) is first  # the second was the oldest
    assert used(2) is not second
    assert len(sampler._samplers) == 4


def test_calls_that_differ_in_what_they_keep():
    """One after the other, of the same number of steps."""
    sampler, x = LangevinDynamics(Quadratic(), step_size=0.1, noise_scale=1e-20), torch.ones(2, 3)
    for call, kept in (
        ({}, 0),
        ({"thin": 1}, 6),
        ({"thin": 2}, 3),
        ({"thin": 3}, 2),
        ({"thin": 2}, 3),
    ):
        states = sampler.sample(x, n_steps=6, return_trajectory=bool(call), **call)
        assert states.is_contiguous()
        assert states.shape == ((2, kept, 3) if call else (2, 3))
        torch.testing.assert_close(states if not call else states[:, -1], 0.9**6 * x)


def test_results_need_no_gradients():
    x, found = LangevinDynamics(MLPEnergy(3)).sample(
        torch.ones(2, 3), n_steps=2, return_diagnostics=True
    )
    assert not any(t.requires_grad for t in (x, *found.values()))


def test_diagnostics_of_one_chain_and_of_chains_apart(torchebm):
    for x in (torch.ones(1, 2), torch.tensor([[0.0], [1e8]]), torch.ones(3, 2)):
        (_, a), (_, b) = (
            cls(_torchebm_quadratic(), step_size=1e-9, noise_scale=1e-20).sample(
                x, n_steps=2, return_diagnostics=True
            )
            for cls in (theirs(torchebm), LangevinDynamics)
        )
        torch.testing.assert_close(b, a, rtol=1e-5, atol=0)  # a variance is 0 or tiny


def test_energies_of_another_dtype_are_the_state_s():
    _, found = LangevinDynamics(
        lambda x: x.float().square().sum(1), dtype=torch.float64
    ).sample(dim=2, n_steps=2, return_diagnostics=True)  # fmt: skip
    assert {t.dtype for t in found.values()} == {torch.float64}


def test_all_of_a_generator_s_bits_are_the_seed():
    sampler, x = LangevinDynamics(Quadratic(), step_size=0.1), torch.ones(2, 3)
    got = sampler.sample(x, n_steps=1, generator=torch.Generator().manual_seed(0))
    low, high = torch.randint(0, 2**32, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    plain = cf.LangevinSampler(Quadratic(), n_steps=1, drift=0.1, noise=0.2**0.5)
    torch.testing.assert_close(got, plain(x, key=cf.Key(low + 2**32 * high)).x, rtol=0, atol=0)


def test_two_steps_of_two_sizes():
    scheduler = Falling()
    sampler = LangevinDynamics(Quadratic(), step_size=scheduler, noise_scale=1e-20)
    x = sampler.sample(torch.ones(2, 3), n_steps=2)
    torch.testing.assert_close(x, torch.full((2, 3), 0.5 * 0.75))
    assert scheduler.steps == 2


class Reads(Quadratic):
    """Its force follows what it holds."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        (of,) = self.held.values() if isinstance(self.held, dict) else self.held
        return of.get_value() * super().forward(x)


@pytest.mark.parametrize("holds", [lambda s: [s], lambda s: (s,), lambda s: {"force": s}])
def test_a_model_that_holds_the_step_size_s_scheduler(holds):
    scheduler = Falling()
    sampler = LangevinDynamics(Reads(holds(scheduler)), step_size=scheduler, noise_scale=1e-20)
    x = sampler.sample(torch.ones(2, 3), n_steps=3)
    expected = (1 - 0.5**2) * (1 - 0.25**2) * (1 - 0.125**2)
    torch.testing.assert_close(x, torch.full((2, 3), expected))


def test_a_model_that_holds_a_constant_runs_as_one_chain(monkeypatch):
    sampler = LangevinDynamics(Quadratic())
    constant = sampler.get_schedulers()["step_size"]
    sampler = LangevinDynamics(Reads([constant]), step_size=Falling())
    monkeypatch.setattr(sampler, "_run_step_by_step", None)
    sampler.sample(torch.ones(2, 3), n_steps=3)


def test_bounds_of_arguments():
    with pytest.raises(ValueError, match="clamp min must be < max"):
        LangevinDynamics(Quadratic(), clamp=(1.0, 1.0))
    with pytest.raises(ValueError, match="decay is not supported"):
        LangevinDynamics(Quadratic(), decay=-0.1)
    assert LangevinDynamics(Quadratic()).sample(dim=0, n_steps=1).shape == (1, 0)
    model = Quadratic()
    model.register_buffer("scale", torch.ones(1, device="meta"))
    assert _device_of(model) == torch.device("meta")
