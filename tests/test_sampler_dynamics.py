"""MALA and BAOAB with the options of LangevinSampler: graphs, compile, autocast, several tensors,
records. Without a GPU a recording runs the chain again (test_sampler_graph.py)."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from test_sampler_graph import FakeRecording, Norms
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext.energies import MLPEnergy, ResEnergy
from coopflow_ext.samplers import MALASampler, UnderdampedLangevinSampler, checks, graph

KEY = cf.Key(5)
KINDS = {
    "mala": partial(MALASampler, kernel=False),
    "underdamped": UnderdampedLangevinSampler,
}
OPTIONS = {
    "plain": {},
    "records": {"stats": True, "return_trajectory": True, "thin": 2},
    "schedule": {"step_size": lambda k: 0.4 / (k + 2), "stats": True},
    "per chain": {"step_size": [[0.1, 0.2, 0.3, 0.2, 0.1]]},
    "table": {"step_size": torch.rand(37, 5, generator=torch.Generator().manual_seed(0))},
    "autocast": {"autocast": torch.bfloat16, "stats": True},
    "temperature": {"temperature": 0.3, "negative_energy": True, "return_trajectory": True},
}
OWN = {
    "mala": {
        "adapted": {"adapt_steps": 21, "stats": True},
        "adapted to the end": {"adapt_steps": 37, "target_accept": 0.8, "step_size": [[0.3] * 5]},
    },
    "underdamped": {
        "mass": {"mass": torch.tensor([0.5, 1.0, 2.0]), "stats": True},
        "schedules": {"friction": lambda k: k / 9, "temperature": torch.linspace(0, 2, 37)},
        "freeze": {"on_nonfinite": "freeze", "stats": True},
        "ignore": {"on_nonfinite": "ignore", "return_trajectory": True, "mass": 3.0},
    },
}
CASES = [(kind, name) for kind in KINDS for name in (*OPTIONS, *OWN[kind])]


def make(kind: str, energy, options: str | dict, **more):
    if isinstance(options, str):
        options = {**OPTIONS, **OWN[kind]}[options]
    return KINDS[kind](energy, **{"n_steps": 37, "step_size": 0.2, **options, **more})


def assert_same(a, b, **tolerance: float) -> None:
    """Every field; to the bit unless a tolerance is given."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    assert a._fields == b._fields
    for name, x, y in zip(a._fields, a, b, strict=True):
        if name == "key":
            assert x == y
        elif name == "stats" and x is not None:
            torch.testing.assert_close(vars(x), vars(y), equal_nan=True, **tolerance)
        elif x is not None:
            torch.testing.assert_close(x, y, equal_nan=True, **tolerance)
        else:
            assert y is None


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(graph, "Recording", FakeRecording)
    for kind in (MALASampler, UnderdampedLangevinSampler):
        monkeypatch.setattr(kind, "_can_capture", lambda self, x: True)
    FakeRecording.made = FakeRecording.ops = 0
    return FakeRecording


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_replays_equal_plain_runs(recorded, kind, name):
    """Pieces of 16, 16, 4 and 1 steps; parameters change in place between the calls."""
    energy = MLPEnergy(3)
    captured = make(kind, energy, name)
    plain = make(kind, energy, name, cuda_graph=False)
    outs = []
    for seed in range(3):
        x0 = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        outs.append(captured(x0, key=cf.Key(seed)))
        assert_same(outs[-1], plain(x0, key=cf.Key(seed)))
        with torch.no_grad():
            for p in energy.parameters():
                p.mul_(0.9)
    assert recorded.made == 1
    assert not torch.equal(outs[0].x, outs[1].x)  # results are copies
    if name in ("records", "temperature"):
        thin = {**OPTIONS, **OWN[kind]}[name].get("thin", 1)
        assert outs[0].trajectory.shape == (37 // thin, 5, 3)
    elif kind == "mala":
        assert outs[0].trajectory is None


@pytest.mark.parametrize(
    ("kind", "name"), [("mala", "adapted"), ("mala", "records"), ("underdamped", "records")]
)
def test_results_stay_when_the_next_call_is_made(recorded, kind, name):
    sampler, x0 = make(kind, MLPEnergy(3), name), torch.randn(5, 3)
    first = sampler(x0, key=KEY)
    kept = copy.deepcopy(first)
    second = sampler(x0 + 1, key=cf.Key(6))
    assert recorded.made == 1
    assert not torch.equal(first.x, second.x)
    assert_same(first, kept)


def test_the_start_in_an_error_is_a_copy():
    x0 = torch.tensor([[1.0], [-1.0]])
    with pytest.raises(cf.NonFiniteError) as caught:
        make("mala", lambda x: x.log().sum(1), {"n_steps": 2})(x0)
    x0.zero_()
    assert caught.value.x.tolist() == [[1.0], [-1.0]]


def pair_energy(s, centre, scale):
    return scale * ((s[0] - centre["a"]).square().sum((1, 2)) + (s[1] * s[0][:, 0]).square().sum(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", [list, tuple])
def test_several_tensors_in_a_graph(recorded, kind, structure):
    """With supplied normals, velocities and nested arguments: inputs of one capture."""
    options = {"n_steps": 6, "stats": True, "return_trajectory": True, "step_size": 0.3}
    if kind == "underdamped":
        options["mass"] = [torch.tensor([[2.0], [0.5]]), torch.tensor(3.0)]
    captured = make(kind, pair_energy, options)
    plain = make(kind, pair_energy, options, cuda_graph=False)
    for seed in range(2):
        torch.manual_seed(seed)
        x0 = structure([torch.randn(4, 2, 3), torch.randn(4, 3)])
        call = {"xi": [torch.randn(6, *x.shape) for x in x0],
                "model_kwargs": {"centre": {"a": torch.randn(2, 3)}, "scale": 0.7}}  # fmt: skip
        if kind == "underdamped":
            call["velocity"] = [torch.randn(x.shape) for x in x0]
        a, b = captured(x0, key=KEY, **call), plain(x0, key=KEY, **call)
        assert_same(a, b)
        assert type(a.x) is type(a.trajectory) is structure
        assert all(not torch.equal(x, y) for x, y in zip(a.x, x0, strict=True))
        assert a.trajectory[1].shape == (6, 4, 3)
    assert recorded.made == 1
    with pytest.warns(UserWarning, match="model_kwargs must be tensors or hashable"):
        captured(x0, model_kwargs={"centre": {"a": x0[0][0]}, "scale": _Unhashable(0.5)})


class _Unhashable(float):
    __hash__ = None


@pytest.mark.parametrize("kind", KINDS)
def test_several_tensors_are_one_state(kind):
    """The same chains as with all in one tensor: accepted, masked and measured together."""
    energy, x0 = MLPEnergy(5).double(), torch.randn(6, 5, dtype=torch.float64)
    xi = torch.randn(9, 6, 5, dtype=torch.float64)
    options = {"n_steps": 9, "step_size": 0.9, "stats": True}
    call = {"velocity": torch.randn(6, 5).double()} if kind == "underdamped" else {}
    masses = torch.linspace(0.5, 2, 5).double()
    whole_mass = {"mass": masses} if kind == "underdamped" else {}
    parts_mass = {"mass": masses.split([2, 3])} if kind == "underdamped" else {}
    whole = make(kind, energy, {**options, **whole_mass})(x0, key=KEY, xi=xi, **call)

    def split(t: Tensor) -> tuple[Tensor, ...]:
        return t.split([2, 3], dim=-1)

    parts = make(kind, lambda s: energy(torch.cat(s, 1)), {**options, **parts_mass})(
        split(x0), key=KEY, xi=split(xi), **{name: split(v) for name, v in call.items()}
    )
    torch.testing.assert_close(torch.cat(parts.x, 1), whole.x)
    torch.testing.assert_close(vars(parts.stats), vars(whole.stats))
    drawn = make(kind, lambda s: energy(torch.cat(s, 1)), options)(split(x0), key=KEY)
    one = make(kind, lambda s: energy(torch.cat(s, 1)), options)(
        tuple(x[2:3] for x in split(x0)), key=KEY.at_chain(2)
    )
    torch.testing.assert_close([x[2:3] for x in drawn.x], list(one.x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_torch_s_with_weights_cast_once(kind):
    energy, x0 = MLPEnergy(4), torch.randn(8, 4)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return energy(x.to(torch.bfloat16))

    options = {"n_steps": 6, "step_size": 0.4, "stats": True}
    low = make(kind, energy, options, autocast=torch.bfloat16)(x0, key=KEY)
    assert_same(low, make(kind, cast, options)(x0, key=KEY))
    full = make(kind, energy, options)(x0, key=KEY)
    assert low.x.dtype == torch.float32
    assert not torch.equal(low.x, full.x)
    assert energy.layers[0].weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gradients(kind):
    energy, x0 = MLPEnergy(4), torch.randn(8, 4)
    options = {"n_steps": 4, "step_size": 0.3, "stats": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = make(kind, energy, options, compile=True)(x0, key=KEY)
    assert_same(compiled, make(kind, energy, options)(x0, key=KEY), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_capture_leaves_buffers_and_generators_as_they_were(recorded, kind):
    x0, results = torch.randn(6, 3), []
    for cuda_graph in ("auto", False):
        energy = Norms()
        torch.manual_seed(1)
        out = make(kind, energy, {"n_steps": 5}, cuda_graph=cuda_graph)(x0, key=KEY)
        assert int(energy.net[1].num_batches_tracked) == 6  # the start's gradient, and each step's
        results.append((out.x, torch.rand(3), *energy.buffers()))
    assert recorded.made == 1
    torch.testing.assert_close(*results, rtol=0, atol=0)


class NoReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default, torch.ops.aten.masked_select.default,
        )  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_loop_reads_nothing_on_the_host(monkeypatch, kind, name):
    ran = []
    sampler = make(kind, MLPEnergy(3), name)
    kept = type(sampler.plan).chain

    def watched(plan, inputs):
        chain = kept(plan, inputs)
        begin, run = chain.begin, chain.run

        def within(function, *args, **kwargs):
            with NoReads():
                function(*args, **kwargs)
            ran.append(function.__name__)

        chain.begin, chain.run = partial(within, begin), partial(within, run)
        return chain

    monkeypatch.setattr(type(sampler.plan), "chain", watched)
    sampler(torch.randn(5, 3), key=KEY)
    assert ran == ["begin", "run"]


@pytest.mark.parametrize("cuda_graph", ["auto", False])
def test_a_start_that_is_not_finite_is_found_in_either_way(recorded, cuda_graph):
    sampler = make("mala", lambda x: x.log().sum(1), {"n_steps": 20}, cuda_graph=cuda_graph)
    x0 = torch.tensor([[1.0], [-1.0], [2.0]])
    with pytest.raises(cf.NonFiniteError, match="energy or its gradient was not finite") as caught:
        sampler(x0)
    assert caught.value.chains.tolist() == [1]
    assert caught.value.step == 0
    assert torch.equal(caught.value.x, x0)
    sampler(x0.abs())  # what the chain met before is over


@pytest.mark.parametrize("cuda_graph", ["auto", False])
def test_where_an_underdamped_chain_stopped(recorded, cuda_graph):
    """The step counts from the start, over the pieces of a recording."""

    def score(x):
        return torch.where(x > 10, torch.nan, 0.0)

    options = {"n_steps": 40, "step_size": 1.0, "temperature": 0.0, "friction": 0.0}
    sampler = UnderdampedLangevinSampler(score=score, cuda_graph=cuda_graph, **options)
    x0 = torch.tensor([[0.0], [-10.5], [-50.0], [11.0]])
    with pytest.raises(cf.NonFiniteError, match=r"in 3 of 4 chains") as caught:
        sampler(x0, velocity=torch.ones(4, 1))
    assert caught.value.step == 0
    assert caught.value.x.flatten().tolist() == [11.0, 10.5, -10.0, 11.0]
    with pytest.raises(cf.NonFiniteError) as caught:
        sampler(x0[:3], velocity=torch.ones(3, 1))
    assert caught.value.step == 11
    assert recorded.made == 2 * (cuda_graph == "auto")


def test_adaptation_does_not_change_with_the_capture(recorded):
    """Its clock runs over the pieces; after its end nothing moves."""
    sampler = make("mala", MLPEnergy(3), "adapted")
    out = sampler(torch.randn(5, 3), key=KEY)
    assert torch.equal(out.stats.step_size[21:], out.step_size.expand(16, 5))
    assert (out.stats.step_size[1:22] != out.stats.step_size[:21]).all()


@pytest.mark.parametrize("mass", [0.5, torch.tensor([0.5, 3.0])])
def test_stationary_variances_with_a_mass(mass):
    """Position τ/λ whatever the mass, velocity τ/m·(1 − h²λ/(4m)) at the end of a step."""
    lam, h, tau, n = 1.3, 0.8, 0.7, 100_000
    sampler = UnderdampedLangevinSampler(
        lambda x: 0.5 * lam * x.square().sum(1), n_steps=60, step_size=h, temperature=tau,
        mass=mass,
    )  # fmt: skip
    out = sampler((tau / lam) ** 0.5 * cf.ops.normal((n, 2), cf.Key(1).tensor()), key=cf.Key(2))
    m = torch.as_tensor(mass).expand(2)
    band = 5 * (2 / n) ** 0.5
    torch.testing.assert_close(out.x.var(0), torch.full((2,), tau / lam), rtol=band, atol=0)
    expected = tau / m * (1 - h * h * lam / (4 * m))
    torch.testing.assert_close(out.velocity.var(0), expected, rtol=band, atol=0)


@pytest.mark.parametrize("several", [False, True])
def test_a_mass_is_copied_when_the_sampler_is_made(several):
    mass, x0 = torch.full((2,), 2.0, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    sampler = UnderdampedLangevinSampler(
        (lambda s: s[0].square().sum(1)) if several else (lambda x: x.square().sum(1)),
        n_steps=3, step_size=0.1, mass=[mass] if several else mass,
    )  # fmt: skip
    start = [x0] if several else x0
    before = sampler(start, key=KEY)
    mass.fill_(50.0)
    assert_same(sampler(start, key=KEY), before)


def test_the_equations_with_a_mass():
    """m scales time and force: a chain of mass m, written out."""
    net = MLPEnergy(3).double()
    x = x0 = torch.randn(4, 3, dtype=torch.float64)
    v = v0 = torch.randn(4, 3, dtype=torch.float64)
    xi, m = torch.randn(5, 4, 3, dtype=torch.float64), torch.tensor([0.5, 1.0, 3.0]).double()
    h, c = 0.3, torch.tensor(-0.7 * 0.3, dtype=torch.float64).exp()

    def force(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(net(leaf).sum(), leaf)[0] / m

    kinetic = []
    for k in range(5):
        v = v - h / 2 * force(x)
        x = x + h / 2 * v
        v = c * v + (1.5 * (1 - c * c) / m).sqrt() * xi[k]
        x = x + h / 2 * v
        v = v - h / 2 * force(x)
        kinetic.append((m * v * v).sum(1) / 2)
    out = UnderdampedLangevinSampler(
        net, n_steps=5, step_size=h, friction=0.7, temperature=1.5, mass=m, stats=True
    )(x0, xi=xi, velocity=v0)
    torch.testing.assert_close((out.x, out.velocity), (x, v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.stats.kinetic, torch.stack(kinetic), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("mass", "error", "match"),
    [
        (0.0, ValueError, "^mass must be > 0, got 0"),
        (-1.0, ValueError, "^mass must be > 0, got -1"),
        (float("inf"), ValueError, "^mass must be finite, got inf"),
        ("heavy", TypeError, "^mass must be a number, got str"),
        (torch.tensor([1.0, 0.0]), ValueError, "^mass must be finite and > 0 in every element"),
        (torch.tensor([1.0, torch.nan]), ValueError, "^mass must be finite and > 0"),
        (torch.tensor([True]), TypeError, r"^mass must be real numbers, got torch\.bool"),
        (torch.ones(2, requires_grad=True), ValueError, "^mass must not require grad"),
        ([torch.ones(2), -torch.ones(1)], ValueError, r"^mass\[1\] must be finite and > 0"),
        ([1.0], TypeError, r"^mass\[0\] must be a tensor, got float"),
    ],
)
def test_a_mass_that_is_not_positive_is_refused(mass, error, match):
    with pytest.raises(error, match=match):
        UnderdampedLangevinSampler(lambda x: x.sum(1), n_steps=1, step_size=0.1, mass=mass)


@pytest.mark.parametrize(
    ("mass", "match"),
    [
        (torch.ones(3), r"mass must broadcast to one chain's shape \(2,\), got shape \(3,\)"),
        (torch.ones(4, 2), r"mass must broadcast to one chain's shape \(2,\), got shape \(4, 2\)"),
        ([torch.ones(2)] * 2, r"mass must have 1 tensor\(s\), like x0, got 2"),
        (1e-60, r"mass must be finite and > 0 in torch\.float32"),
        (torch.tensor(1e60, dtype=torch.float64), r"mass must be finite and > 0 in torch\.float32"),
    ],
)
def test_a_mass_that_does_not_fit_is_refused(mass, match):
    sampler = UnderdampedLangevinSampler(lambda x: x.sum(1), n_steps=1, step_size=0.1, mass=mass)
    with pytest.raises(ValueError, match=match):
        sampler(torch.zeros(4, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_refused_by_name(kind, monkeypatch):
    energy, x0 = MLPEnergy(2), torch.zeros(3, 2)
    for options, error, match in (
        ({"autocast": torch.float32}, ValueError, "autocast must be one of"),
        ({"cuda_graph": "yes"}, ValueError, "cuda_graph must be one of"),
        ({"compile": 1}, TypeError, "compile must be True or False"),
    ):
        with pytest.raises(error, match=match):
            make(kind, energy, options)
    with pytest.raises(ValueError, match="cuda_graph=True needs x0 on a CUDA device, got cpu"):
        make(kind, energy, {"cuda_graph": True})(x0)
    if kind == "mala":
        for name in ({"compile": True}, {"autocast": torch.bfloat16}):
            with pytest.raises(ValueError, match=f"kernel=True: .*{next(iter(name))}"):
                MALASampler(energy, n_steps=1, step_size=0.1, kernel=True, **name)
    monkeypatch.setattr(checks, "is_capturing", lambda x: True)
    with pytest.raises(ValueError, match="reads from the device after the chain"):
        make(kind, energy, {})(x0)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_gpu_replays_equal_plain_runs_to_the_bit(gpu, kind, name):
    energy = MLPEnergy(3).to(gpu)
    captured = make(kind, energy, name, cuda_graph=True)
    plain = make(kind, energy, name, cuda_graph=False)
    for seed in range(3):
        x0 = torch.randn(5, 3, device=gpu)
        assert_same(captured(x0, key=cf.Key(seed)), plain(x0, key=cf.Key(seed)))
        with torch.no_grad():
            for p in energy.parameters():
                p.mul_(0.9)
    assert len(captured._graphs._captured) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_images_and_several_tensors(gpu, kind):
    net = ResEnergy(channels=1, width=8, image_size=8).to(gpu)
    options = {"n_steps": 20, "step_size": 0.1, "stats": True}
    x0 = [torch.rand(5, 1, 8, 8, device=gpu), torch.rand(5, 4, device=gpu)]

    def energy(s):
        return net(s[0]).flatten() + s[1].square().sum(1)

    a, b = (make(kind, energy, options, cuda_graph=g)(x0, key=KEY) for g in (True, False))
    torch.testing.assert_close(a.x, b.x, rtol=1e-3, atol=1e-4)
    cpu = make(kind, lambda s: nn.functional.mse_loss(s[0], s[1], reduction="none").sum(1), options)
    pair = [torch.rand(5, 4), torch.rand(5, 4)]
    there = [x.to(gpu) for x in pair]
    torch.testing.assert_close(
        [x.cpu() for x in cpu(there, key=KEY).x], cpu(pair, key=KEY).x, rtol=1e-3, atol=1e-4
    )


@pytest.mark.gpu
def test_gpu_a_host_sync_is_named_once(gpu):
    def energy(x: Tensor) -> Tensor:
        return x.square().sum(1) * (1.0 if x.sum().item() > 0 else 2.0)

    x0 = torch.randn(8, 3, device=gpu)
    for kind in KINDS:
        sampler = make(kind, energy, {"n_steps": 3})
        with pytest.warns(UserWarning, match="cannot be captured"):
            out = sampler(x0, key=KEY)
        plain = make(kind, energy, {"n_steps": 3}, cuda_graph=False)
        torch.testing.assert_close(out.x, plain(x0, key=KEY).x)
