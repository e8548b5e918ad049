"""Whole chains as CUDA graphs. The first part replaces the recording by running the chain again,
so that everything around it is tested without a GPU."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

import coopflow_ext as cf
from coopflow_ext._recording import CaptureError, Recording
from coopflow_ext.energies import GaussianEnergy, MLPEnergy, ResEnergy
from coopflow_ext.samplers import (
    LangevinSampler,
    UnderdampedLangevinSampler,
    checks,
    graph,
)

KEY = cf.Key(5)
stepwise = partial(LangevinSampler, kernel=False)  # a chain in one kernel needs no graph


class FakeRecording(Recording):
    """Stands for the captured work: warm-up and capture, then the same run at each replay."""

    made = 0  # recordings; each has several pieces
    ops = 0  # in all pieces of all recordings, what their graphs would hold

    def __init__(self, device) -> None:
        type(self).made += 1
        self._device = device
        self.runs: dict = {}
        self.in_use = False

    def __contains__(self, name) -> bool:
        return name in self.runs

    def add(self, name, run, *, warm_up) -> None:
        assert not self.in_use
        assert name not in self.runs
        for _ in range(3):
            warm_up()
        with CountOps() as counted:
            run()
        type(self).ops += counted.ops
        self.runs[name] = run

    def wait(self) -> None:
        assert not self.in_use

    def replay(self, name) -> None:
        self.in_use = True
        self.runs[name]()

    def release(self) -> None:
        self.in_use = False

    def finish(self) -> None:
        assert not self.in_use

    def forget(self, name) -> None:
        del self.runs[name]


class CountOps(TorchDispatchMode):
    ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorded(monkeypatch):
    """Samplers take the captured path on the CPU."""
    monkeypatch.setattr(graph, "Recording", FakeRecording)
    monkeypatch.setattr(LangevinSampler, "_can_capture", lambda self, x: True)
    FakeRecording.made = FakeRecording.ops = 0
    return FakeRecording


OPTIONS = [
    {},
    {"stats": True, "return_trajectory": True, "thin": 2},
    {"noise_before_gradient": True, "clamp": (-1, 1)},
    {"noise_before_gradient": True, "on_nonfinite": "ignore"},
    {"noise_before_gradient": True, "clamp": (-0.3, 0.3), "clamp_when": "both"},
    {"noise_before_gradient": True, "clamp": (-0.3, 0.3), "clamp_when": "noise", "stats": True,
     "on_nonfinite": "ignore", "autocast": torch.bfloat16},
    {"autocast": torch.bfloat16, "grad_norm": 0.5},
    {"pull": (None, 0.5)},
    {"drift": lambda k: 0.3 / (k + 1), "noise": [[0.1, 0.2, 0.3, 0.2, 0.1]], "stats": True},
    {"clamp": (-0.5, 0.5), "clamp_when": "end", "grad_clip": 0.3, "step_clip": 0.05,
     "reference_std": 2.0, "on_nonfinite": "freeze"},
    {"denoise": 0.1, "return_trajectory": True, "include_start": True, "thin": 2, "stats": True},
    {"after_step": lambda x, step: x.clamp(-0.5, 0.5) * (1 - 0.001 * step)},
    {"after_step": lambda x, step: x.clamp_(-0.5, 0.5), "noise_before_gradient": True,
     "autocast": torch.bfloat16},
    {"snr": 0.1, "drift": None, "noise": None, "stats": True},
    {"snr": 0.1, "snr_over": "batch", "drift": None, "noise": None},
    {"preconditioner": torch.tensor(0.5), "noise_before_gradient": True, "momentum": 0.2},
    {"momentum": 0.5, "nesterov": True},
]  # fmt: skip


def assert_equal_outputs(a, b) -> None:
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=0)
    assert a.key == b.key
    if a.trajectory is not None:
        assert torch.equal(a.trajectory, b.trajectory)
    if a.stats is not None:
        torch.testing.assert_close(vars(a.stats), vars(b.stats), rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_replays_equal_plain_runs(recorded, options):
    energy = MLPEnergy(3)
    common = {"n_steps": 6, "drift": 0.2, "noise": 0.1, **options}
    captured = stepwise(energy, **common)
    plain = stepwise(energy, cuda_graph=False, **common)
    outputs = []
    for seed, n_steps in enumerate((6, 6, 37, 1, 16)):
        x0 = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        call = {"n_steps": n_steps} | ({"x_ref": x0 + seed} if "pull" in options else {})
        outputs.append(captured(x0, key=cf.Key(seed), **call))
        assert_equal_outputs(outputs[-1], plain(x0, key=cf.Key(seed), **call))
        with torch.no_grad():
            for p in energy.parameters():
                p.mul_(0.9)
    assert recorded.made == 1  # parameters changed in place
    assert not torch.equal(outputs[0].x, outputs[1].x)  # results are copies
    assert all(p.requires_grad for p in energy.parameters())


def test_nested_model_kwargs(recorded):
    """Their tensors are inputs of the graph, everything else in them belongs to its kind."""

    class Pair(NamedTuple):
        centre: Tensor
        scale: float

    def energy(x, where, scales):
        assert type(where["pair"]) is Pair
        centre = where["pair"].centre + sum(where["shifts"])
        return ((x - centre) * scales[0] * where["pair"].scale).square().sum(1)

    def kwargs(value, scale=0.5, n=2, **more):
        shifts = [torch.full((2,), value) for _ in range(n)]
        return {"where": {"pair": Pair(torch.ones(4, 2) * value, scale), "shifts": shifts, **more},
                "scales": (torch.tensor(0.5), None)}  # fmt: skip

    def run(sampler, **given):
        return sampler(torch.zeros(4, 2), key=KEY, model_kwargs=kwargs(**given)).x

    sampler, plain = (
        stepwise(energy, n_steps=3, step_size=0.3, cuda_graph=graphs) for graphs in ("auto", False)
    )
    for value in (1.0, 2.0):
        assert torch.equal(run(sampler, value=value), run(plain, value=value))
    assert recorded.made == 1
    for made, other in enumerate(({"scale": 0.25}, {"n": 3}, {"unused": True}, {"unused": 1}), 2):
        assert torch.equal(run(sampler, value=1.0, **other), run(plain, value=1.0, **other))
        assert recorded.made == made


def test_arguments_of_earlier_calls_stay_as_they_are(recorded):
    """What a capture reads is its own."""
    sampler = stepwise(lambda x, c: (x - c["at"]).square().sum(1), n_steps=3, step_size=0.3)
    rows = stepwise(lambda x, c: (x - c).square().sum(1), n_steps=3, step_size=0.3)
    centres = [torch.full((2,), value) for value in (1.0, 2.0)]
    tables = [torch.full((3,), value) for value in (1.0, 2.0)]
    for centre, table in zip(centres, tables, strict=True):
        sampler(torch.zeros(4, 2), key=KEY, model_kwargs={"c": {"at": centre}})
        rows(torch.zeros(4, 2), key=KEY, step_kwargs={"c": table})
    assert recorded.made == 2
    assert centres[0].tolist() == [1.0] * 2
    assert tables[0].tolist() == [1.0] * 3


def test_one_capture_for_each_kind_of_call_and_a_bounded_cache(recorded):
    energy = MLPEnergy(3)
    sampler = stepwise(energy, n_steps=2, step_size=0.1)

    def run(n, **call):
        sampler(torch.randn(n, 3), **call)
        return recorded.made

    assert run(5) == 1
    assert run(5, key=KEY) == 1
    assert run(6) == 2
    assert run(5, key=KEY.at_chain(3)) == 2  # every chain's number
    assert run(7) == 3
    assert run(5, xi=torch.randn(2, 5, 3)) == 4
    assert run(5) == 4
    energy.eval()
    assert run(5) == 5
    energy.train()
    assert run(5) == 5
    assert run(6) == 6  # the least recently used was dropped
    assert len(sampler._graphs._captured) == 4
    energy.layers[0].weight = nn.Parameter(torch.zeros_like(energy.layers[0].weight))
    assert run(5) == 7
    hook = energy.layers[0].register_forward_hook(lambda module, given, out: 2 * out)
    assert run(5) == 8
    hook.remove()
    assert run(5) == 8  # the one before is still there


def test_calls_whose_tensors_alone_are_alike(recorded):
    """Lists and tuples, integers and fractions, memory layouts: each kind as in a plain run."""

    def compare(energy, calls, **options):
        before = recorded.made
        captured = stepwise(energy, n_steps=3, step_size=0.3, **options)
        plain = stepwise(energy, n_steps=3, step_size=0.3, cuda_graph=False, **options)
        for x0, call in calls:
            a, b = captured(x0, key=KEY, **call).x, plain(x0, key=KEY, **call).x
            assert type(a) is type(b)
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert recorded.made - before == len(calls)

    pair = torch.ones(4, 2), torch.ones(4, 3)
    compare(
        lambda s: (1 + isinstance(s, list)) * (s[0].square().sum(1) + s[1].square().sum(1)),
        [(pair, {}), (list(pair), {})],
    )
    rows = torch.tensor([1, 2, 3])
    compare(
        lambda x, c: (x - c.reshape(-1, 1)).square().sum(1),
        [(pair[0], {"step_kwargs": {"c": c}}) for c in (rows, rows + 0.5, rows[:, None])],
    )
    image = torch.ones(2, 3, 4, 4)
    compare(
        lambda x: x.square().sum((1, 2, 3)),
        [(image, {}), (image.to(memory_format=torch.channels_last), {})],
    )


def test_model_kwargs(recorded):
    def energy(x, centre, scale, unhashable=()):
        return scale * (x - centre).square().sum(1)

    sampler = stepwise(energy, n_steps=50, drift=0.2, noise=0.0)
    for value in (1.0, 2.0):
        centre = torch.full((4, 2), value)
        x = sampler(torch.zeros(4, 2), model_kwargs={"centre": centre, "scale": 0.5}).x
        torch.testing.assert_close(x, centre, atol=1e-3, rtol=0)
    assert recorded.made == 1
    sampler(torch.zeros(4, 2), model_kwargs={"centre": centre, "scale": 0.25})
    assert recorded.made == 2
    with pytest.warns(UserWarning, match="model_kwargs must be tensors or hashable"):
        sampler(torch.zeros(4, 2), model_kwargs={"centre": 0, "scale": 1, "unhashable": {0}})


@pytest.mark.parametrize("noise_first", [False, True])
def test_several_tensors_with_supplied_normals_and_chains_that_stop(recorded, noise_first):
    def energy(state):
        a, b = state
        u = a.square().sum(1) + b**4  # NaN where b is large
        return u + torch.where(b > 1.2, torch.nan, 0.0) * b

    options = {"n_steps": 6, "drift": 0.1, "noise": 0.3, "grad_norm": 1.0, "stats": True,
               "return_trajectory": True, "thin": 2, "on_nonfinite": "freeze",
               "noise_before_gradient": noise_first}  # fmt: skip
    captured = stepwise(energy, **options)
    plain = stepwise(energy, cuda_graph=False, **options)
    stopped = 0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x0 = [torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)]
        xi = [torch.randn(6, *x.shape, generator=generator) for x in x0]
        a, b = captured(x0, xi=xi, key=KEY), plain(x0, xi=xi, key=KEY)
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=0)
        torch.testing.assert_close(a.trajectory, b.trajectory, rtol=0, atol=0)
        torch.testing.assert_close(vars(a.stats), vars(b.stats), rtol=0, atol=0, equal_nan=True)
        stopped += int((a.stats.nonfinite[-1] > 0).sum())
    assert recorded.made == 1
    assert 0 < stopped < 32


def test_nonfinite_chains_raise(recorded):
    def score(x):
        return torch.where(x > 0, torch.nan, -x)

    sampler = stepwise(score=score, n_steps=2, step_size=0.1)
    with pytest.raises(cf.NonFiniteError) as caught:
        sampler(torch.tensor([[-9.0], [1.0]]))
    assert caught.value.chains.tolist() == [1]


def test_what_an_error_holds_stays_when_the_next_call_is_made(recorded):
    def score(x):
        return torch.where(x > 0, torch.nan, -x)

    sampler, x0 = stepwise(score=score, n_steps=2, step_size=0.1), torch.tensor([[-9.0], [1.0]])
    with pytest.raises(cf.NonFiniteError) as caught:
        sampler(x0)
    before = caught.value.x.clone()
    sampler(x0 - 5)
    assert recorded.made == 1
    assert torch.equal(caught.value.x, before)


def test_refusal_warns_once_or_raises(monkeypatch, recorded):
    class Refuses(FakeRecording):
        def add(self, *args, **options) -> None:
            raise CaptureError("RuntimeError: operation not permitted")

    monkeypatch.setattr(graph, "Recording", Refuses)
    energy, x0 = MLPEnergy(3), torch.randn(4, 3)
    sampler = stepwise(energy, n_steps=2, step_size=0.1)
    plain = stepwise(energy, n_steps=2, step_size=0.1, cuda_graph=False)
    with pytest.warns(UserWarning, match="cannot be captured.*operation not permitted"):
        out = sampler(x0, key=KEY)
    assert torch.equal(out.x, plain(x0, key=KEY).x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(x0, key=KEY)
    assert Refuses.made == 1
    with pytest.raises(RuntimeError, match=r"cuda_graph=True: .*operation not permitted"):
        stepwise(energy, n_steps=2, step_size=0.1, cuda_graph=True)(x0)
    assert all(p.requires_grad for p in energy.parameters())


def test_pieces_are_the_steps_in_turn():
    for marks_end in (False, True):
        for n_steps in range(70):
            found = list(graph.pieces(n_steps, marks_end=marks_end))
            steps = [start + k for start, piece in found for k in range(piece.n_steps)]
            assert steps == list(range(n_steps))
            ends = [piece.ends for _, piece in found]
            assert ends == [marks_end and i + 1 == len(ends) for i in range(len(ends))]
            assert len(found) <= n_steps // 16 + 6


@pytest.mark.parametrize("options", [{}, {"stats": True, "return_trajectory": True, "thin": 3}])
def test_a_capture_does_not_grow_with_the_chain(recorded, options):
    """Neither the work in its graphs nor the memory that they work on."""
    found = []
    for n_steps in (37, 2005):
        sampler = stepwise(score=lambda x: -x, n_steps=n_steps, drift=lambda k: 0.1 / (k + 1),
                           noise=0.1, **options)  # fmt: skip
        before = recorded.ops
        sampler(torch.randn(4, 3), xi=torch.randn(n_steps, 4, 3), key=KEY)
        (captured,) = sampler._graphs._captured.values()
        chain, records = captured.chain, captured.chain.records
        kept = [*chain.inputs.constants(), *chain.inputs.xis, *captured._windows.values(),
                *records.sums, *(records.trajectory or ())]  # fmt: skip
        found.append((recorded.ops - before, sum(t.nbytes for t in kept)))
    assert found[0] == found[1]
    assert found[0][0] >= 16 + 4 + 1  # a step is at least one


def test_the_step_of_a_chain_that_stops_is_the_chain_s(recorded):
    """Though each piece of it counts from 0."""

    def score(x: Tensor) -> Tensor:
        return torch.where(x > 20.5, torch.nan, 1.0)

    x0 = torch.tensor([[-9.0], [1.0], [0.0], [-99.0]])
    for cuda_graph in ("auto", False):
        sampler = stepwise(score=score, n_steps=40, drift=1.0, noise=0.0, cuda_graph=cuda_graph)
        with pytest.raises(cf.NonFiniteError, match=r"in 3 of 4 chains \(0, 1, 2\).*step 20") as e:
            sampler(x0)
        assert e.value.step == 20
        assert e.value.x.flatten().tolist() == [21, 21, 21, -59]
        frozen = stepwise(score=score, n_steps=40, drift=1.0, noise=0.0, cuda_graph=cuda_graph,
                          on_nonfinite="freeze")  # fmt: skip
        assert frozen(x0).frozen_at.tolist() == [30, 20, 21, 40]
    assert recorded.made == 2


def test_other_steps_and_coefficients_need_no_other_capture(recorded):
    energy, x0 = MLPEnergy(3), torch.randn(5, 3)
    sampler = stepwise(energy, n_steps=20, step_size=0.1, reference_std=2.0, pull=(x0, 0.3))
    calls = [
        {},
        {"n_steps": 55},
        {"temperature": 0.5},
        {"drift": lambda k: 0.1 / (k + 1), "n_steps": 33},
        {"drift": 0.02, "noise": torch.linspace(0.3, 0.1, 20)},
        {},
        {"step_size": [0.2] * 5, "n_steps": 5},
    ]
    for call in calls:
        made = {"step_size": 0.1} if not call.keys() & {"drift", "step_size"} else {}
        alone = stepwise(energy, **{"n_steps": 20, **made, **call}, cuda_graph=False,
                         reference_std=2.0, pull=(x0, 0.3))  # fmt: skip
        assert_equal_outputs(sampler(x0, key=KEY, **call), alone(x0, key=KEY))
    assert recorded.made == 1
    sampler(x0, drift=torch.rand(1, 5) / 10)  # values per chain lie in memory otherwise
    assert recorded.made == 2
    sampler(x0, noise=0.0)  # draws none
    assert recorded.made == 3


def test_inside_a_capture_of_the_caller_nothing_is_copied_from_the_host(monkeypatch):
    monkeypatch.setattr(checks, "is_capturing", lambda x: True)
    energy, x0 = GaussianEnergy(torch.zeros(3), torch.eye(3)), torch.randn(4, 3)
    steps = {"n_steps": 2, "on_nonfinite": "freeze"}
    LangevinSampler(energy, **steps, step_size=0.1)(x0)
    with pytest.raises(ValueError, match="drift is a tensor in the host's memory"):
        LangevinSampler(energy, **steps, step_size=[0.1, 0.2])(x0)
    UnderdampedLangevinSampler(energy, **steps, step_size=0.1, friction=1.0, mass=2.0)(x0)
    with pytest.raises(ValueError, match="mass is a tensor in the host's memory"):
        UnderdampedLangevinSampler(
            energy, **steps, step_size=0.1, friction=1.0, mass=torch.ones(3)
        )(x0)


def test_inside_a_capture_of_the_caller_steps_run_one_by_one(recorded, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(graph, "Recording", FakeRecording)
    for module in (graph, checks):
        monkeypatch.setattr(module, "is_capturing", lambda x: True)
    energy, x0 = MLPEnergy(3), torch.randn(4, 3)
    for kernel in (False, True):
        options = {"n_steps": 3, "step_size": 0.1, "kernel": kernel}
        sampler = LangevinSampler(energy, on_nonfinite="freeze", **options)
        out = sampler(x0, key=KEY)
        assert_equal_outputs(
            out, LangevinSampler(energy, **options, on_nonfinite="ignore")(x0, key=KEY)
        )
        with pytest.raises(
            ValueError, match=r"on_nonfinite='raise' reads.*use 'freeze' or 'ignore'"
        ):
            LangevinSampler(energy, **options)(x0)
    assert recorded.made == 0


class Norms(nn.Module):
    """What counts its passes, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            spectral_norm(nn.Linear(3, 8)), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_capture_leaves_buffers_and_generators_as_they_were(recorded):
    """T steps count as T, and dropout continues the same sequence."""
    x0, results = torch.randn(6, 3), []
    for cuda_graph in ("auto", False):
        energy = Norms()
        torch.manual_seed(1)
        sampler = stepwise(energy, n_steps=5, step_size=0.1, cuda_graph=cuda_graph)
        x = sampler(x0, key=KEY).x
        assert int(energy.net[1].num_batches_tracked) == 5
        results.append((x, torch.rand(3), *energy.buffers()))
    assert recorded.made == 1
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"autocast": torch.bfloat16}])
@pytest.mark.parametrize("kind", ["data", "table"])
def test_an_energy_that_replaces_its_buffers_runs_without_a_graph(recorded, kind, options):
    """A replay would read the memory where they were; a capture for each call would be no use."""

    class Replaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3), requires_grad=False)
            self.register_buffer("u", torch.ones(3))
            torch.manual_seed(0)
            self.net = nn.Linear(3, 3)  # has a copy in autocast

        def forward(self, x: Tensor) -> Tensor:
            if kind == "data":  # as the spectral norm of much published code
                self.scale.data = self.scale * 0.9
            else:
                self.u = self.u * 0.9
            return self.net(x * self.u * self.scale).square().sum(1)

    energy, plain = Replaces(), Replaces()
    sampler = stepwise(energy, n_steps=3, step_size=0.1, **options)
    name = "scale" if kind == "data" else "u"
    x0 = torch.randn(4, 3)
    with pytest.warns(UserWarning, match=f"puts {name} into other memory") as caught:
        outs = [sampler(x0, key=KEY).x for _ in range(3)]
    assert len(caught) == 1
    assert recorded.made == 1
    reference = stepwise(plain, n_steps=3, step_size=0.1, cuda_graph=False, **options)
    assert all(torch.equal(out, reference(x0, key=KEY).x) for out in outs)
    torch.testing.assert_close(energy.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert caught[0].filename == __file__
    must = stepwise(Replaces(), n_steps=3, step_size=0.1, cuda_graph=True, **options)
    for _ in range(2):  # what the first call has recorded must not serve the second
        with pytest.raises(RuntimeError, match=r"cuda_graph=True: .* into other memory"):
            must(x0)


def test_buffers_belong_to_one_thread_at_a_time(recorded):
    """A second call of the sampler waits until the first has copied its results."""
    net, x0 = MLPEnergy(3), torch.randn(4, 3)
    inside: list[threading.Thread] = []

    def energy(x: Tensor) -> Tensor:
        if inside and threading.current_thread() is threading.main_thread():
            if not inside[0].is_alive() and inside[0].ident is None:
                inside[0].start()
            inside[0].join(0.05)  # it would run to its end here, or fail: the buffers are in use
            assert inside[0].is_alive()
        return net(x)

    sampler = stepwise(energy, n_steps=3, step_size=0.1)
    expected = [sampler(x, key=KEY).x for x in (x0, x0 + 1)]
    results = []
    thread = threading.Thread(target=lambda: results.append(sampler(x0 + 1, key=KEY).x))
    inside.append(thread)
    assert torch.equal(sampler(x0, key=KEY).x, expected[0])
    inside.clear()
    thread.join(60)
    assert torch.equal(results[0], expected[1])
    assert recorded.made == 1


def test_everything_is_released_with_the_sampler(recorded):
    sampler = stepwise(MLPEnergy(3), n_steps=2, step_size=0.1)
    sampler(torch.randn(4, 3))
    (captured,) = sampler._graphs._captured.values()
    buffers = weakref.ref(captured.chain.xs[0])
    gc.disable()  # nothing may wait for the collector
    try:
        del sampler, captured
        assert buffers() is None
    finally:
        gc.enable()


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_gpu_replays_equal_plain_runs(gpu, options):
    """Same noise, gradients to rounding; parameters change in place between the calls."""
    energy = ResEnergy(channels=1, width=8, image_size=8).to(gpu)
    common = {"n_steps": 6, "drift": 0.2, "noise": 0.1, **options}
    captured = stepwise(energy, cuda_graph=True, **common)
    plain = stepwise(energy, cuda_graph=False, **common)
    for seed in range(3):
        x0 = torch.rand(5, 1, 8, 8, device=gpu)
        call = {"x_ref": x0 + seed} if "pull" in options else {}
        a, b = captured(x0, key=cf.Key(seed), **call), plain(x0, key=cf.Key(seed), **call)
        torch.testing.assert_close(a.x, b.x, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            for p in energy.parameters():
                p.mul_(0.9)
    assert len(captured._graphs._captured) == 1


@pytest.mark.gpu
def test_gpu_arguments_that_differ_from_step_to_step(gpu):
    def score(x, sigma, label):
        return -x / (1 + sigma) + 0.1 * label[:, None]

    x0, label = torch.randn(64, 3, device=gpu), torch.rand(37, 64)
    options = {"n_steps": 37, "step_size": 0.1, "denoise": 0.1, "return_trajectory": True}
    captured, plain = (stepwise(score=score, **options, cuda_graph=g) for g in (True, False))
    for scale in (1.0, 2.0):
        rows = {"sigma": scale * torch.linspace(1, 0, 37), "label": label.to(gpu)}
        a, b = (s(x0, key=KEY, step_kwargs=rows) for s in (captured, plain))
        torch.testing.assert_close(a.trajectory, b.trajectory, rtol=1e-5, atol=1e-6)
    assert len(captured._graphs._captured) == 1


@pytest.mark.gpu
def test_gpu_other_steps_and_coefficients_in_the_same_capture(gpu):
    energy, x0 = MLPEnergy(3).to(gpu), torch.randn(64, 3, device=gpu)
    options = {"n_steps": 20, "step_size": 0.1, "stats": True, "return_trajectory": True, "thin": 3}
    captured, plain = (stepwise(energy, **options, cuda_graph=g) for g in (True, False))
    for call in ({}, {"n_steps": 200}, {"drift": lambda k: 0.1 / (k + 1)}, {"temperature": 0.1}):
        a, b = captured(x0, key=KEY, **call), plain(x0, key=KEY, **call)
        torch.testing.assert_close(a.trajectory, b.trajectory, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(vars(a.stats), vars(b.stats), rtol=1e-2, atol=1e-3)
    assert len(captured._graphs._captured) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [False, True])
def test_gpu_inside_a_capture_of_the_caller(gpu, kernel):
    """A whole iteration as one graph: the steps become part of it."""
    energy, x0 = MLPEnergy(3).to(gpu), torch.randn(64, 3, device=gpu)
    sampler = LangevinSampler(
        energy, n_steps=20, step_size=0.1, on_nonfinite="freeze", kernel=kernel
    )
    expected = sampler(x0, key=KEY).x
    recording, result = graph.Recording(gpu), []
    recording.add("all", lambda: result.append(sampler(x0, key=KEY).x),
                  warm_up=lambda: sampler(x0, key=KEY))  # fmt: skip
    for x in (x0, x0 + 1):
        x0.copy_(x)
        recording.replay("all")
        torch.testing.assert_close(result[0], sampler(x0, key=KEY).x, rtol=1e-4, atol=1e-5)
    assert not torch.equal(result[0], expected)


@pytest.mark.gpu
def test_gpu_fresh_noise_at_every_replay(gpu):
    sampler = stepwise(score=lambda x: -x, n_steps=3, step_size=0.1, cuda_graph=True)
    x0, key = torch.zeros(64, 3, device=gpu), KEY
    first = sampler(x0, key=key)
    second = sampler(x0, key=first.key)
    assert not torch.equal(first.x, second.x)
    assert torch.equal(sampler(x0, key=key).x, first.x)
    cpu = stepwise(score=lambda x: -x, n_steps=3, step_size=0.1)(x0.cpu(), key=key)
    torch.testing.assert_close(first.x.cpu(), cpu.x, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_gpu_on_other_streams(gpu):
    energy = MLPEnergy(3).to(gpu)
    sampler = stepwise(energy, n_steps=20, step_size=0.1, cuda_graph=True)
    plain = stepwise(energy, n_steps=20, step_size=0.1, cuda_graph=False)
    x0 = torch.randn(4096, 3, device=gpu)
    expected = [plain(x0, key=cf.Key(k)).x for k in range(8)]
    torch.cuda.synchronize(gpu)
    streams = [torch.cuda.Stream(gpu) for _ in range(2)]
    results = []
    for k in range(8):
        with torch.cuda.stream(streams[k % 2]):
            results.append(sampler(x0, key=cf.Key(k)).x)
    torch.cuda.synchronize(gpu)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_gpu_a_host_sync_is_named_once(gpu):
    def energy(x: Tensor) -> Tensor:
        return x.square().sum(1) * (1.0 if x.sum().item() > 0 else 2.0)

    sampler = stepwise(energy, n_steps=3, step_size=0.1)
    x0 = torch.randn(8, 3, device=gpu)
    with pytest.warns(UserWarning, match="cannot be captured"):
        out = sampler(x0, key=KEY)
    plain = stepwise(energy, n_steps=3, step_size=0.1, cuda_graph=False)
    torch.testing.assert_close(out.x, plain(x0, key=KEY).x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(x0, key=KEY)


class HiddenWait(torch.autograd.Function):
    """Waits for the device in a way that torch's debug mode does not report."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        torch.cuda.current_stream().synchronize()
        return grad


@pytest.mark.gpu
@pytest.mark.parametrize("found", ["before", "during"])
def test_gpu_a_refused_capture_leaves_torch_as_it_was(gpu, found):
    """Generators continue their sequences, streams and memory are as before, graphs can be made."""

    def energy(x: Tensor) -> Tensor:
        u = HiddenWait.apply(x).square().sum(1)
        return u * (1.0 if found == "during" or x.sum().item() > 0 else 2.0)

    x0 = torch.randn(8, 3, device=gpu)
    with torch.cuda.device(gpu):
        torch.cuda.manual_seed(5)
        expected = [torch.rand(7, device=gpu), torch.randn(7, device=gpu)]
        torch.cuda.manual_seed(5)
        stream = torch.cuda.current_stream()
        with pytest.warns(UserWarning, match="cannot be captured"):
            out = stepwise(energy, n_steps=3, step_size=0.1)(x0, key=KEY)
        drawn = [torch.rand(7, device=gpu), torch.randn(7, device=gpu)]
        torch.testing.assert_close(drawn, expected, rtol=0, atol=0)
        assert torch.cuda.current_stream() == stream
        assert torch.cuda.get_sync_debug_mode() == 0
        assert torch.is_grad_enabled()
        plain = stepwise(energy, n_steps=3, step_size=0.1, cuda_graph=False)
        torch.testing.assert_close(out.x, plain(x0, key=KEY).x)
        # Memory used on two streams is only freed again where no capture counts as underway.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(gpu)
        other = torch.cuda.Stream()
        for _ in range(4):
            block = torch.empty(2**26, device=gpu)
            block.record_stream(other)
            del block
            torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved(gpu) <= reserved
        healthy = stepwise(lambda x: x.square().sum(1), n_steps=3, step_size=0.1,
                                  cuda_graph=True)  # fmt: skip
        healthy(x0)


@pytest.mark.gpu
def test_gpu_a_capture_leaves_buffers_and_generators_as_they_were(gpu):
    x0, results = torch.randn(6, 3, device=gpu), []
    for cuda_graph in (True, False):
        energy = Norms().to(gpu)
        torch.cuda.manual_seed(1)
        sampler = stepwise(energy, n_steps=5, step_size=0.1, cuda_graph=cuda_graph)
        x = sampler(x0, key=KEY).x
        assert int(energy.net[1].num_batches_tracked) == 5
        results.append((x, torch.rand(3, device=gpu), *energy.buffers()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_gpu_memory_is_released(gpu):
    energy = ResEnergy(channels=1, width=16, image_size=32).to(gpu)
    x0 = torch.rand(64, 1, 32, 32, device=gpu)
    torch.cuda.synchronize(gpu)
    stepwise(energy, n_steps=2, step_size=0.1, cuda_graph=False)(x0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(gpu)
    sampler = stepwise(energy, n_steps=2, step_size=0.1, cuda_graph=True)
    sampler(x0)
    del sampler
    torch.cuda.synchronize(gpu)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(gpu) <= before + 2**22


@pytest.mark.gpu
def test_gpu_compiled_score_in_a_graph(gpu):
    energy = MLPEnergy(3).to(gpu)
    x0 = torch.randn(256, 3, device=gpu)
    a = stepwise(energy, n_steps=5, step_size=0.1, compile=True, cuda_graph=True)
    b = stepwise(energy, n_steps=5, step_size=0.1, cuda_graph=False)
    torch.testing.assert_close(a(x0, key=KEY).x, b(x0, key=KEY).x, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_gpu_weights_are_read_as_they_are_in_the_callers_autocast(gpu):
    """Not the casts of them that autocast kept when the chain was recorded."""
    energy, x0 = MLPEnergy(3, (16, 16)).to(gpu), torch.randn(5, 3, device=gpu)
    graphed = stepwise(energy, n_steps=4, step_size=0.1, cuda_graph=True)
    plain = stepwise(energy, n_steps=4, step_size=0.1, cuda_graph=False)
    for seed in range(4):
        ends = []
        for sampler in (graphed, plain):
            with torch.autocast("cuda", torch.bfloat16):
                ends.append(sampler(x0, key=cf.Key(seed)).x)
        torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            for parameter in energy.parameters():
                parameter.mul_(1.2)
