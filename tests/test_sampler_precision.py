"""autocast, channels_last and compile: the same chain, computed otherwise."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext.energies import MLPEnergy, ResEnergy
from coopflow_ext.samplers import LangevinSampler
from coopflow_ext.samplers.gradient import reason
from coopflow_ext.samplers.precision import CastModel

KEY = cf.Key(3)
T = 4


@pytest.fixture
def energy() -> ResEnergy:
    torch.manual_seed(0)
    return ResEnergy(channels=2, width=4, image_size=8)


@pytest.fixture
def x0() -> Tensor:
    return torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def autocast_loop(energy, x, xi, drift, noise):
    """A plain loop that casts the weights anew at every step."""
    for z in xi:
        leaf = x.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            u = energy(leaf)
        (grad,) = torch.autograd.grad(u.sum(), leaf)
        x = x - drift * grad.float() + noise * z
    return x


@pytest.mark.parametrize("noise_first", [False, True])
def test_autocast_gives_autocasts_numbers_and_keeps_the_states_dtype(energy, x0, noise_first):
    xi = torch.randn(T, *x0.shape)
    sampler = LangevinSampler(
        energy, n_steps=T, drift=5.0, noise=0.1, autocast=torch.bfloat16,
        noise_before_gradient=noise_first, return_trajectory=True,
    )  # fmt: skip
    out = sampler(x0, xi=xi)
    assert out.x.dtype == torch.float32
    if noise_first:
        x = x0
        for k in range(T):
            x = autocast_loop(energy, x + 0.1 * xi[k], xi[k : k + 1], 5.0, 0.0)
    else:
        x = autocast_loop(energy, x0, xi, 5.0, 0.1)
    torch.testing.assert_close(out.x, x, rtol=1e-6, atol=1e-6)
    exact = LangevinSampler(energy, n_steps=T, drift=5.0, noise=0.1,
                            noise_before_gradient=noise_first)(x0, xi=xi).x  # fmt: skip
    assert not torch.equal(out.x, exact)
    torch.testing.assert_close(out.x, exact, rtol=0, atol=2e-2)


def test_weight_copies_are_made_once_per_chain(energy, x0, monkeypatch):
    refreshed = []
    original = CastModel.refresh
    monkeypatch.setattr(CastModel, "refresh", lambda self: (refreshed.append(1), original(self))[1])
    seen: set[torch.dtype] = set()
    handle = energy.stem.register_forward_hook(lambda m, i, o: seen.add(m.weight.dtype))
    own = dict(energy.named_parameters())
    sampler = LangevinSampler(energy, n_steps=T, step_size=0.1, autocast=torch.bfloat16)
    first = sampler(x0, key=KEY).x
    handle.remove()
    assert len(refreshed) == 1
    assert seen == {torch.bfloat16}
    after = dict(energy.named_parameters())
    assert all(after[name] is p and p.requires_grad for name, p in own.items())
    assert list(after) == list(own)
    with torch.no_grad():
        energy.head.weight.mul_(3)
    assert not torch.equal(sampler(x0, key=KEY).x, first)  # the copies follow the weights


def test_weights_come_back_after_an_error(energy, x0):
    own = dict(energy.named_parameters())
    failing = LangevinSampler(
        energy, n_steps=T, step_size=0.1, autocast=torch.bfloat16, channels_last=True
    )
    with pytest.raises(ValueError, match="x must have shape"):
        failing(x0[:, :1])
    assert all(p is own[name] and p.dtype == torch.float32 for name, p in energy.named_parameters())


def test_only_weights_that_autocast_casts_are_copied():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 8))
            self.head = nn.Linear(8, 1)
            self.centre = nn.Parameter(torch.full((1, 3), 0.123456789))
            self.dtypes: set[torch.dtype] = set()

        def forward(self, x: Tensor) -> Tensor:
            self.dtypes = {self.centre.dtype, self.layer.parametrizations.weight.original1.dtype}
            return self.head(torch.tanh(self.layer(x - self.centre)))

    net = Net()
    LangevinSampler(net, n_steps=2, step_size=0.1, autocast=torch.bfloat16)(torch.randn(4, 3))
    assert net.dtypes == {torch.float32}


class Restless(nn.Module):
    """Shared and nested layers, a buffer changed in place, one replaced, a counter, a method."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3))
        self.same = self.net[0]
        self.head = nn.Linear(8, 1)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.passes.add_(1)
        self.last = self.passes * 2
        self.seen = self.same.weight.dtype
        return self.head(torch.tanh(self.same(self.net(x))))

    def energy(self, x: Tensor) -> Tensor:
        return self(x) + x.square().sum(1, keepdim=True)


def test_a_module_in_several_places_stays_one():
    """What a pass sets on it in one place, the other finds."""

    class Counting(nn.Linear):
        calls = 0

        def __call__(self, x):
            self.calls += 1
            return super().__call__(x) * self.calls

    torch.manual_seed(0)
    shared = Counting(3, 3)
    net = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared, nn.Linear(3, 1)))
    x = torch.randn(4, 3)
    options = {"n_steps": 3, "drift": 0.1, "noise": 0.0}
    sampler = LangevinSampler(net, **options, autocast=torch.bfloat16)
    ours = sampler(x, key=KEY).x
    assert shared.calls == 6
    shared.calls = 0
    with torch.autocast("cpu", torch.bfloat16):
        theirs = LangevinSampler(net, **options, kernel=False)(x, key=KEY).x
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", [False, True])
def test_what_a_forward_pass_sets_on_its_module_is_kept(method):
    """As in a plain loop, though the module that computes is another."""
    net = Restless()
    tensors = dict(net.named_parameters())
    passes = net.passes
    function = net.energy if method else net
    sampler = LangevinSampler(function, n_steps=T, step_size=0.1, autocast=torch.bfloat16)
    for chains in (1, 2):
        sampler(torch.randn(5, 3))
        assert net.calls == int(net.passes) == chains * T
        assert int(net.last) == 2 * chains * T
        assert net.seen == torch.bfloat16
    assert net.passes is passes
    assert net.same is net.net[0]
    assert all(p is tensors[name] for name, p in net.named_parameters())
    net.net[0] = net.same = nn.Linear(3, 8)  # what the caller does counts at the next chain
    net.head.eval()
    modes = [m.training for m in net.modules()]
    expected = LangevinSampler(function, n_steps=T, step_size=0.1, autocast=torch.bfloat16)
    x0 = torch.randn(5, 3)
    assert torch.equal(sampler(x0, key=KEY).x, expected(x0, key=KEY).x)
    assert [m.training for m in net.modules()] == modes


def test_a_method_is_called_on_the_module_of_the_copies():
    """Not the module's forward, which is another energy."""
    net, x = Restless(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    options = {"n_steps": T, "drift": 0.1, "noise": 0.0, "autocast": torch.bfloat16}
    ours = LangevinSampler(net.energy, **options)(x).x
    assert net.seen == torch.bfloat16
    assert torch.equal(ours, autocast_loop(net.energy, x, torch.zeros(T, *x.shape), 0.1, 0.0))


def test_channels_last(energy, x0):
    options = {"n_steps": T, "drift": 5.0, "noise": 0.0}
    expected = LangevinSampler(energy, **options)(x0).x
    out = LangevinSampler(energy, channels_last=True, return_trajectory=True, **options)(x0)
    assert out.x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.x, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.trajectory[-1], out.x, rtol=0, atol=0)
    assert energy.stem.weight.is_contiguous()
    # A chain's elements take their noise in storage order.
    noise = LangevinSampler(
        score=torch.zeros_like, n_steps=1, drift=0.0, noise=1.0, channels_last=True
    )(torch.zeros(3, 2, 8, 8), key=KEY).x
    flat = cf.ops.normal((3, 128), KEY.tensor())
    assert torch.equal(noise.permute(0, 2, 3, 1).reshape(3, 128), flat)
    # A start that is channels_last stays so.
    given = x0.contiguous(memory_format=torch.channels_last)
    kept = LangevinSampler(energy, **options)(given).x
    assert kept.is_contiguous(memory_format=torch.channels_last)


def test_supplied_normals_and_centres_follow_the_layout(energy, x0):
    xi, x_ref = torch.randn(T, *x0.shape), torch.zeros_like(x0)
    options = {"n_steps": T, "drift": 0.5, "noise": 0.1, "pull": (x_ref, 0.5)}
    expected = LangevinSampler(energy, **options)(x0, xi=xi).x
    out = LangevinSampler(energy, channels_last=True, **options)(x0, xi=xi).x
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_differentiable_chains_in_low_precision(energy, x0):
    options = {"n_steps": 2, "drift": 1.0, "noise": 0.0, "differentiable": True}
    grads = []
    for precision in ({}, {"autocast": torch.bfloat16}, {"channels_last": True}):
        x = x0.clone().requires_grad_()
        end = LangevinSampler(energy, **precision, **options)(x).x
        grads.append(torch.autograd.grad(end.square().sum(), [x, energy.head.weight]))
    for other, tolerance in ((grads[1], 3e-2), (grads[2], 1e-4)):
        for a, b in zip(other, grads[0], strict=True):
            assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.slow
def test_accuracy_on_the_papers_network():
    """Relative error of the gradient against float64, as stated in LangevinSampler's docstring."""
    torch.manual_seed(0)
    energy = ResEnergy(width=16, image_size=32)
    x0 = torch.rand(2, 3, 32, 32) * 2 - 1
    exact = -LangevinSampler(energy.double(), n_steps=1, drift=1.0, noise=0.0)(x0.double()).x + x0
    energy.float()
    scale = 0.1 / exact.square().mean().sqrt().item()  # so that x − drift·g keeps g's digits
    for options, bound in (
        ({}, 5e-6), ({"channels_last": True}, 5e-6), ({"compile": True}, 5e-6),
        ({"autocast": torch.bfloat16}, 2e-2),
    ):  # fmt: skip
        x = LangevinSampler(energy, n_steps=1, drift=scale, noise=0.0, **options)(x0).x
        error = ((x0 - x).double() / scale - exact).norm() / exact.norm()
        assert error < bound, options


# --- compile ------------------------------------------------------------------------------------


@pytest.fixture
def without_inductor(monkeypatch):
    """The compiler's front end only: the same program, captured but not compiled to code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("negative", [False, True])
def test_compiled_gradient(negative):
    energy = MLPEnergy(3)
    x0 = torch.randn(5, 3)
    function = (lambda x: -energy(x)) if negative else energy
    options = {"n_steps": T, "step_size": 0.3, "stats": True, "negative_energy": negative}
    expected = LangevinSampler(function, **options)(x0, key=KEY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = LangevinSampler(function, compile=True, **options)
        out = sampler(x0, key=KEY)
        again = sampler(x0, key=KEY)
    torch.testing.assert_close(out.x, expected.x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.stats.energy, expected.stats.energy, rtol=1e-5, atol=1e-6)
    assert torch.equal(again.x, out.x)
    assert all(p.requires_grad for p in energy.parameters())


@pytest.mark.usefixtures("without_inductor")
def test_compiled_score_and_several_tensors():
    x0 = torch.randn(5, 3)
    options = {"n_steps": T, "step_size": 0.3}
    expected = LangevinSampler(score=lambda x: -x, **options)(x0, key=KEY).x
    compiled = LangevinSampler(score=lambda x: -x, compile=True, **options)(x0, key=KEY).x
    torch.testing.assert_close(compiled, expected)

    def energy(state):
        return state[0].square().sum(1) + (state[0][:, :1] * state[1]).sum(1)

    both = [
        LangevinSampler(energy, compile=flag, **options)([x0, x0 + 1], key=KEY).x
        for flag in (False, True)
    ]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("kind", ["energy", "score"])
def test_many_samplers_are_all_compiled(monkeypatch, kind):
    """torch.compile gives up on a function after eight variants; samplers share none."""
    compiled = []

    def backend(program, inputs):
        compiled.append(program)
        return program

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    x0 = torch.randn(5, 3)
    for k in range(12):
        scale = torch.tensor(float(k))
        function = {"energy": lambda x, s=scale: (s * x).square().sum(1),
                    "score": lambda x, s=scale: -s * x}[kind]  # fmt: skip
        before = len(compiled)
        out = LangevinSampler(**{kind: function}, n_steps=2, step_size=0.1, compile=True)(
            x0, key=KEY
        )
        plain = LangevinSampler(**{kind: function}, n_steps=2, step_size=0.1)(x0, key=KEY)
        torch.testing.assert_close(out.x, plain.x)
        assert len(compiled) > before


def test_compile_falls_back_with_one_warning(monkeypatch):
    def broken(function):
        def fail(*args, **kwargs):
            raise RuntimeError("no C++ compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    energy, x0 = MLPEnergy(3), torch.randn(5, 3)
    sampler = LangevinSampler(energy, n_steps=T, step_size=0.3, compile=True)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found") as caught:
        outputs = [sampler(x0, key=KEY) for _ in range(2)]
    assert len(caught) == 1
    expected = LangevinSampler(energy, n_steps=T, step_size=0.3)(x0, key=KEY)
    assert all(torch.equal(out.x, expected.x) for out in outputs)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("compile", [False, True])
def test_a_detached_energy_is_refused(compile):
    net = MLPEnergy(3)  # whose parameters require gradients, so that its values do
    for energy in (lambda x: x.detach().sum(1), lambda x: net(x.detach())):
        sampler = LangevinSampler(energy, n_steps=T, step_size=0.3, compile=compile)
        with pytest.raises(ValueError, match="energy returned a tensor detached from x"):
            sampler(torch.randn(5, 3))


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("compile", [False, True])
def test_passes_are_steps(compile):
    """No pass beside the chain's: of a batch norm, and of what counts its calls."""

    class Counting(MLPEnergy):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    counting = Counting(3)
    LangevinSampler(counting, n_steps=5, step_size=0.1, compile=compile)(torch.randn(8, 3))
    assert counting.calls == 5
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))
    with warnings.catch_warnings():  # torch.func.grad does not take a batch norm that trains
        warnings.simplefilter("ignore")
        LangevinSampler(net, n_steps=5, step_size=0.1, compile=compile)(torch.randn(8, 3))
    assert int(net[1].num_batches_tracked) == 5


def test_casts_of_compiled_models_are_compiled_once(monkeypatch):
    """Weights that change in place, or are replaced, compile nothing again."""
    compiled = []

    def backend(program, inputs):
        compiled.append(program)
        return program

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    net, x0 = MLPEnergy(3), torch.randn(5, 3)
    options = {"n_steps": 2, "step_size": 0.1, "autocast": torch.bfloat16}
    sampler = LangevinSampler(net, compile=True, **options)
    for k in range(4):
        expected = LangevinSampler(net, **options)(x0, key=KEY).x
        torch.testing.assert_close(sampler(x0, key=KEY).x, expected, rtol=1e-2, atol=1e-2)
        with torch.no_grad():
            net.layers[0].weight.mul_(1.1)
        if k == 2:
            net.layers[0].weight = nn.Parameter(net.layers[0].weight.detach() * 0.5)
    assert len(compiled) == 1


def test_a_sampler_that_compiles_is_copied_and_pickled():
    sampler = LangevinSampler(MLPEnergy(3), n_steps=2, step_size=0.1, compile=True)
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert other.plan.gradient._compiled is not None
        assert other.plan.gradient.function is not sampler.plan.gradient.function


def test_messages_give_the_reason_not_the_first_line():
    error = RuntimeError("backend='inductor' raised:\n\n  NoCompiler: none found\nhint\nhint")
    assert reason(error) == ("RuntimeError: backend='inductor' raised: NoCompiler: none found hint")


def test_differentiable_steps_are_not_compiled():
    with pytest.warns(UserWarning, match="cannot differentiate twice"):
        LangevinSampler(MLPEnergy(3), n_steps=2, step_size=0.1, compile=True, differentiable=True)


@pytest.mark.slow
def test_compiled_by_inductor():
    energy, x0 = MLPEnergy(3), torch.randn(64, 3)
    options = {"n_steps": T, "step_size": 0.3}
    out = LangevinSampler(energy, compile=True, **options)(x0, key=KEY).x
    torch.testing.assert_close(out, LangevinSampler(energy, **options)(x0, key=KEY).x)


class _Breaks(torch.nn.Module):
    broken = False

    def forward(self, x):
        if self.broken:
            raise KeyError("mine")
        return x.square().sum(1)


def test_an_error_of_the_energy_is_no_failure_to_compile(recwarn):
    """It reaches the caller as it is, and the gradient stays compiled."""
    net = _Breaks()
    sampler = LangevinSampler(net, n_steps=2, step_size=0.1, compile=True, kernel=False)
    x0 = torch.ones(2, 3)
    expected = sampler(x0, key=KEY).x
    net.broken = True
    with pytest.raises(KeyError, match="mine"):
        sampler(x0, key=KEY)
    net.broken = False
    assert torch.equal(sampler(x0, key=KEY).x, expected)
    assert sampler.plan.gradient._compiled is not None
    assert not [w for w in recwarn if "could not compile" in str(w.message)]


class Standardised(nn.Conv2d):
    """Weight standardisation, whose result a constant in the weights does not change."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class StandardisedInside(Standardised):
    """Likewise, by the other method of torch's layer."""

    forward = nn.Conv2d.forward

    def _conv_forward(self, x, weight, bias):
        return Standardised.forward(self, x)


class SameForward(nn.Linear):
    pass


@pytest.mark.parametrize("standardised", [Standardised, StandardisedInside])
def test_weights_that_a_layer_computes_with_are_not_rounded(standardised):
    """As autocast has it, where a subclass of torch's layers has a forward of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(standardised(3, 8, 3), nn.SiLU(), nn.Flatten(), SameForward(288, 1))
    net[0].weight.data.add_(1.0)
    x = torch.rand(4, 3, 8, 8)

    def gradient(low):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            u = net(leaf)
        return torch.autograd.grad(u.sum(), leaf)[0]

    sampler = LangevinSampler(net, n_steps=1, drift=1.0, noise=0.0, autocast=torch.bfloat16)
    ours, exact = x - sampler(x, key=cf.Key(0)).x, gradient(False)
    theirs = (gradient(True) - exact).norm()
    assert 0 < (ours - exact).norm() < 1.5 * theirs
    names = {id(p): name for name, p in net.named_parameters()}
    cast = CastModel(sampler.plan.gradient, torch.bfloat16, channels_last=False)
    assert {names[id(weight)] for weight, _ in cast._copies} == {"3.weight", "3.bias"}


def test_weights_are_cast_anew_in_the_callers_autocast():
    """Those that a module computes with by itself, and that change between two chains in it."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight).float().square().sum(1) / 2

    net, x0 = Own(), torch.ones(2, 3)
    sampler = LangevinSampler(
        net, n_steps=1, drift=0.5, noise=0.0, autocast=torch.bfloat16, cuda_graph=False
    )
    ends = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            ends.append(sampler(x0).x)
            with torch.no_grad():
                net.weight.zero_()
    assert torch.equal(ends[0], x0 / 2)
    assert torch.equal(ends[1], x0)
