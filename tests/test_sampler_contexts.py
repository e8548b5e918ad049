"""Every sampler: what it leaves alone, where it can be called from, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext import data, presets
from coopflow_ext.data import toy
from coopflow_ext.energies import GaussianEnergy, MLPEnergy
from coopflow_ext.samplers import LangevinSampler

KEY = cf.Key(3)
T = 3


def langevin(**options):
    return lambda energy, n_steps=T: cf.LangevinSampler(
        energy, n_steps=n_steps, step_size=0.3, **options
    )


SAMPLERS: dict[str, Callable] = {
    "langevin": langevin(),
    "all records": langevin(stats=True, return_trajectory=True, noise_before_gradient=True),
    "autocast": langevin(autocast=torch.bfloat16),
    "differentiable": langevin(differentiable=True),
    "last step": langevin(differentiable="last"),
    "checkpoints": langevin(differentiable=True, checkpoint_every=2),
    "mala": lambda energy, n_steps=T: cf.MALASampler(
        energy, n_steps=n_steps, step_size=0.3, stats=True, return_trajectory=True
    ),
    "underdamped": lambda energy, n_steps=T: cf.UnderdampedLangevinSampler(
        energy, n_steps=n_steps, step_size=0.3, stats=True, return_trajectory=True
    ),
}
DIFFERENTIABLE = ("differentiable", "last step", "checkpoints")


@pytest.fixture(params=list(SAMPLERS))
def name(request) -> str:
    return request.param


@pytest.fixture
def make(name) -> Callable:
    return SAMPLERS[name]


@pytest.fixture
def x0() -> Tensor:
    return torch.linspace(-1, 1, 12).reshape(4, 3)


class Scaled(nn.Module):
    """A network one of whose parameters is frozen already, with a condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = MLPEnergy(3, widths=(8,))
        self.scale = nn.Parameter(torch.full((3,), 1.5), requires_grad=False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.net(x * self.scale if condition is None else x * self.scale * condition)


class Changed(Scaled):
    """``change`` of what the network returns, from its second call on."""

    def __init__(self, change: Callable[[Scaled, Tensor], object]) -> None:
        super().__init__()
        self.change, self.calls = change, 0

    def forward(self, x: Tensor) -> object:
        self.calls += 1
        u = super().forward(x)
        return self.change(self, u) if self.calls > 1 else u


def required(module: nn.Module) -> list[bool]:
    return [p.requires_grad for p in module.parameters()]


def raise_key_error(module: Scaled, u: Tensor) -> Tensor:
    raise KeyError("inside")


def change_parameters(module: Scaled, u: Tensor) -> Tensor:
    with torch.no_grad():
        module.net.layers[0].weight.mul_(0.9)
    return u


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (raise_key_error, KeyError, "inside"),
        (change_parameters, ValueError, "energy changed its parameters"),
        (lambda m, u: u.sum(), ValueError, r"energy must return one value.*got shape \(\)"),
        (lambda m, u: u[:2], ValueError, r"energy must return one value.*got shape \(2,\)"),
        (lambda m, u: u.detach(), ValueError, "energy returned a tensor detached from x"),
        (lambda m, u: u.long(), TypeError, "energy must return floating-point numbers"),
        (lambda m, u: u.cfloat(), TypeError, "energy must return floating-point numbers"),
        (lambda m, u: None, TypeError, "energy must return a tensor, got NoneType"),
        (lambda m, u: (u, u), TypeError, "energy must return a tensor, got tuple"),
    ],
)
def test_bad_energies_leave_everything_as_it_was(make, x0, change, error, match):
    energy = Changed(change)
    before, start = required(energy), x0.clone()
    with pytest.raises(error, match=match):
        make(energy)(x0, key=KEY)
    assert energy.calls > 1
    assert required(energy) == before
    assert all(p.dtype == torch.float32 for p in energy.parameters())
    assert torch.equal(x0, start)


def test_nan_from_some_chains(name, make, x0):
    energy = Changed(lambda m, u: u * torch.tensor([1, torch.nan, 1, 1]))
    before, start = required(energy), x0.clone()
    if name == "mala":  # such proposals are rejected
        out = make(energy)(x0, key=KEY)
        assert torch.equal(out.x[1], x0[1])
        energy.calls = 1
        with pytest.raises(cf.NonFiniteError, match="the energy or its gradient was not finite"):
            make(energy)(x0, key=KEY)
    else:
        with pytest.raises(cf.NonFiniteError, match=r"gradient .*not finite in 1 of") as caught:
            make(energy)(x0, key=KEY)
        assert caught.value.chains.tolist() == [1]
        assert caught.value.x.isfinite().all()
    assert required(energy) == before
    assert torch.equal(x0, start)


class Gated(Scaled):
    """Each thread can wait at its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[int, Callable[[], None]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.gates.get(threading.get_ident(), lambda: None)()
        return super().forward(x)


@pytest.mark.parametrize("other", list(SAMPLERS))
def test_overlapping_chains_of_one_energy(make, other, x0):
    """One starts, another starts, the first ends, the other ends: nothing that either brings back
    at its end, or holds meanwhile, may reach the other or the caller."""
    energy = Gated()
    parameters = dict(energy.named_parameters())
    first, second = make(energy), SAMPLERS[other](energy)
    expected = [sampler(x0, key=KEY).x.detach() for sampler in (first, second)]
    second_runs, first_ended = threading.Event(), threading.Event()
    seen: list[bool] = []
    results: dict[int, Tensor] = {}

    def untouched() -> bool:
        return all(
            p is parameters[name] and p.dtype == torch.float32 and p.is_contiguous()
            for name, p in energy.named_parameters()
        ) and required(energy) == required(Scaled())

    def run(i: int, sampler: Callable, gate: Callable[[], bool]) -> None:
        energy.gates[threading.get_ident()] = lambda: seen.extend((gate(), untouched()))
        results[i] = sampler(x0, key=KEY).x.detach()

    def gate_of_second() -> bool:
        second_runs.set()
        return first_ended.wait(60)

    threads = [
        threading.Thread(target=run, args=(0, first, lambda: second_runs.wait(60))),
        threading.Thread(target=run, args=(1, second, gate_of_second)),
    ]
    for thread in threads:
        thread.start()
    threads[0].join(60)
    seen.append(untouched())
    first_ended.set()
    threads[1].join(60)
    assert all(seen)
    assert untouched()
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


def test_an_energy_squeezed_to_a_number(make):
    """Of a batch of one; of a larger batch it is the sum of all, which is refused."""
    x0 = torch.tensor([[0.5, -0.5, 1.0]])
    energy = Scaled()
    expected = make(energy)(x0, key=KEY).x
    assert torch.equal(make(lambda x: energy(x).squeeze())(x0, key=KEY).x, expected)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"key": 0}, TypeError, r"key must be a Key, such as cf.Key\(0\), or None, got int"),
        ({"key": torch.Generator()}, TypeError, "key must be a Key.*got Generator"),
        ({"model_kwargs": [1]}, TypeError, r"model_kwargs must be a mapping.*got \[1\]"),
        ({"model_kwargs": {1: 2}}, TypeError, "model_kwargs must be a mapping"),
        ({"key": KEY.at_chain(2**63 - 2)}, ValueError, r"key.chain must be at most 2\*\*63 - 4"),
        ({"xi": torch.zeros(2, 4, 3)}, ValueError, r"xi must have shape \(3, 4, 3\)"),
    ],
)
def test_bad_calls(make, x0, call, error, match):
    with pytest.raises(error, match=match):
        make(Scaled())(x0, **call)


def test_gradients_modes_and_hooks_of_the_model_stay(make, x0):
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.SiLU(), nn.Linear(8, 1))
    net[1].eval()
    for p in net.parameters():
        p.grad = torch.full_like(p, 7.0)
    grads = [p.grad for p in net.parameters()]
    forward, backward = [], []
    net[0].register_forward_hook(lambda *_: forward.append(1))
    net[0].weight.register_hook(lambda _: backward.append(1))
    modes = [m.training for m in net.modules()]
    make(net)(x0, key=KEY)
    assert forward
    assert not backward
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is g and bool((g == 7).all()) for p, g in zip(net.parameters(), grads,
                                                                   strict=True))  # fmt: skip
    net(x0).sum().backward()
    assert backward == [1]


def test_without_gradients_and_in_inference_mode(name, make, x0):
    sampler = make(Scaled())
    condition = torch.full((3,), 0.5)
    expected = sampler(x0, key=KEY, model_kwargs={"condition": condition}).x.detach()
    with torch.no_grad():
        out = sampler(x0, key=KEY, model_kwargs={"condition": condition}).x
    assert torch.equal(out, expected)
    with torch.inference_mode():  # with a start and a condition that were made in it
        out = sampler(x0 + 0, key=KEY, model_kwargs={"condition": condition + 0}).x
    assert torch.equal(out, expected)
    assert out.requires_grad == (name in DIFFERENTIABLE)


def test_nested_arguments_of_the_energy_in_inference_mode(name, make, x0):
    net = Scaled()

    def energy(x: Tensor, given: dict) -> Tensor:
        return net(x, given["scales"][0] * given["more"]["scale"])

    def given(scale: Tensor) -> dict:
        return {"given": {"scales": (scale, [scale]), "more": {"scale": scale, "name": "scale"}}}

    sampler = make(energy)
    condition = torch.full((3,), 0.5)
    expected = sampler(x0, key=KEY, model_kwargs=given(condition)).x.detach()
    with torch.inference_mode():
        kwargs = given(condition + 0)
        out = sampler(x0, key=KEY, model_kwargs=kwargs).x
        assert kwargs["given"]["scales"][0].is_inference()  # the caller's are left alone
    assert torch.equal(out, expected)
    if name in DIFFERENTIABLE:  # a condition that wants gradients, deep inside
        leaf = condition.clone().requires_grad_()
        (grad,) = torch.autograd.grad(sampler(x0, key=KEY, model_kwargs=given(leaf)).x.sum(), leaf)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("differentiable", [False, True])
def test_samplers_made_in_inference_mode(x0, differentiable):
    """With tables and a centre of that mode, of the dtype and device that the chain wants."""
    net = Scaled().double()
    start = x0.double().requires_grad_(differentiable)

    def make() -> list:
        row = torch.linspace(0.1, 0.3, 4, dtype=torch.float64)[None] * torch.ones(T, 1)
        pull = torch.ones(4, 3, dtype=torch.float64), row[0]
        options = {"differentiable": differentiable, "cuda_graph": False}
        return [
            cf.LangevinSampler(net, n_steps=T, step_size=row, pull=pull, **options),
            cf.LangevinSampler(net, n_steps=T, drift=row, noise=row, reference_std=0.5,
                               noise_before_gradient=True, **options),
            cf.presets.vaebm(net, n_steps=T, step_size=row, pull=pull, **options),
            cf.MALASampler(net, n_steps=T, step_size=row, stats=True),
            cf.UnderdampedLangevinSampler(net, n_steps=T, step_size=row, friction=row,
                                          temperature=row),
        ]  # fmt: skip

    with torch.inference_mode():
        samplers = make()
    for sampler, plain in zip(samplers, make(), strict=True):
        out = sampler(start, key=KEY)
        assert torch.equal(out.x, plain(start, key=KEY).x)
        assert not out.x.is_inference()
        if out.x.requires_grad:
            out.x.sum().backward()


def test_a_start_that_requires_grad(name, make, x0):
    sampler = make(Scaled())
    expected = sampler(x0, key=KEY).x
    leaf = x0.clone().requires_grad_()
    for start in (leaf, leaf * 1):
        out = sampler(start, key=KEY).x
        assert torch.equal(out, expected)
        assert out.requires_grad == (name in DIFFERENTIABLE)
    assert torch.equal(leaf, x0)
    assert leaf.grad is None


def test_parameters_replaced_by_functional_call(name, make, x0):
    """Tensors in the place of parameters are not leaves: nothing to freeze."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return make(self.energy)(x, key=KEY).x

    outer = Outer()
    expected = outer(x0)
    source = {k: v.detach().clone().requires_grad_() for k, v in outer.named_parameters()}
    values = {k: 1 * v for k, v in source.items()}
    if name == "checkpoints":
        with pytest.raises(ValueError, match="checkpoint_every needs an energy whose parameters"):
            torch.func.functional_call(outer, values, (x0,))
        return
    out = torch.func.functional_call(outer, values, (x0,))
    torch.testing.assert_close(out, expected)
    assert out.requires_grad == (name in DIFFERENTIABLE)
    if name in DIFFERENTIABLE:
        (grad,) = torch.autograd.grad(out.sum(), source["energy.net.layers.0.weight"])
        assert grad.abs().sum() > 0


def test_energies_made_of_torch_func(name, make, x0):
    net = Scaled()

    def one(row: Tensor) -> Tensor:
        return net(row[None])[0]

    def energy(x: Tensor) -> Tensor:
        slopes = torch.func.vmap(torch.func.grad(one))(x)
        return torch.func.vmap(one)(x) + slopes.square().sum(1)

    def plain(x: Tensor) -> Tensor:
        (slopes,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return net(x) + slopes.square().sum(1)

    # In bfloat16 the two compute ∇U in different orders.
    tolerance = 1e-2 if name == "autocast" else 1e-5
    a, b = (make(function)(x0, key=KEY).x for function in (energy, plain))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (4, 0)])
@pytest.mark.parametrize("n_steps", [0, T])
def test_empty_batches_states_and_chains(make, shape, n_steps):
    start = torch.ones(shape)
    out = make(lambda x: x.square().sum(1), n_steps)(start, key=KEY)
    assert out.x.shape == shape
    assert out.x is not start
    assert out.key == KEY.advance(n_steps)
    if n_steps == 0:
        assert torch.equal(out.x, start)
    if out.trajectory is not None:
        assert out.trajectory.shape == (n_steps, *shape)
        for column in vars(out.stats).values():
            assert column.shape == (n_steps, shape[0])


def test_states_of_one_number(make):
    """(B,): the same as (B, 1)."""
    x = torch.linspace(-1, 1, 5)
    flat = make(lambda x: x**4)(x, key=KEY)
    column = make(lambda x: (x**4).sum(1))(x[:, None], key=KEY)
    assert torch.equal(flat.x, column.x[:, 0])
    if flat.stats is not None:
        torch.testing.assert_close(vars(flat.stats), vars(column.stats))


def test_copies_and_pickles(make, x0):
    sampler = make(Scaled())
    expected = sampler(x0, key=KEY).x
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(other(x0, key=KEY).x, expected)


ALL_SAMPLERS = {
    "steps": partial(cf.LangevinSampler, drift=0.1, noise=0.05),
    "statistics": partial(cf.LangevinSampler, drift=0.1, stats=True, grad_norm=1.0),
    "noise first": partial(
        cf.LangevinSampler, drift=0.1, noise=0.05, noise_before_gradient=True, denoise=0.1
    ),
    "differentiable": partial(cf.LangevinSampler, drift=0.1, differentiable=True),
    "last step": partial(cf.LangevinSampler, drift=0.1, differentiable="last"),
    "segments": partial(
        cf.LangevinSampler, drift=0.1, differentiable=True, checkpoint_every=3
    ),
    "MALA": partial(cf.MALASampler, step_size=0.1),
    "underdamped": partial(cf.UnderdampedLangevinSampler, step_size=0.1, friction=1.0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "is_score"),
    [(name, s) for name in ALL_SAMPLERS for s in (False, True) if not (s and name == "MALA")],
)
def test_chains_in_the_callers_autocast(name: str, is_score: bool) -> None:
    """Each step rounds the state of that step: autocast would keep the first one's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3 if is_score else 1))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)

    def by_itself(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return net(x) if is_score else net(x).squeeze(-1)

    def end(function: Callable[[Tensor], Tensor]) -> Tensor:
        functions = {"score": function} if is_score else {"energy": function}
        return ALL_SAMPLERS[name](**functions, n_steps=10)(x0, key=KEY).x

    x0 = torch.randn(4, 3)
    expected = end(by_itself)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(end(net), expected)
    assert not torch.equal(end(net), expected)


def test_torchs_default_device_moves_nothing_from_the_cpu():
    """Here to "meta", where all that is made without a device has no data."""
    buffer = cf.ReplayBuffer((3,), size=20, n_classes=4, key=cf.Key(0), device="cpu")
    x, flags, digits = torch.randn(4, 3), torch.tensor([True] * 4), data.load("digits")
    mean, covariance, drift = torch.zeros(2), torch.eye(2), torch.full((3,), 0.1)
    noisy = {"n_steps": 3, "noise": 0.1}

    def energy(x, t=None):
        return x.square().sum(1)

    calls = {
        "labels": lambda: buffer.draw(4, y=1).x,
        "write": lambda: buffer.write(torch.tensor([1], device="cpu"), x[:1]) or buffer.states,
        "flags": lambda: (
            presets.energy_matching(energy, epsilon_max=0.1, n_steps=2, at_data=flags)(
                x, key=cf.Key(0)
            ).x
        ),
        "levels": lambda: (
            presets.ncsn(lambda x, y: -x, sigmas=[1.0, 0.5], n_steps_each=1)(x, key=cf.Key(0)).x
        ),
        "batches": lambda: data.Batches(digits, 8, cf.Key(0))[0],
        "permutation": lambda: data.permutation(4, cf.Key(0)),
        "digits": lambda: data.load("digits").train,
        "toy": lambda: data.load("toy:moons").train,
        "density": lambda: toy.DENSITIES["moons"].log_density(x[:, :2]),
        "drift": lambda: LangevinSampler(energy, drift=drift, **noisy)(x, key=cf.Key(0)).x,
        "energy": lambda: GaussianEnergy(mean, covariance)(x[:, :2]),
        "default key": lambda: LangevinSampler(energy, drift=0.1, **noisy)(x).x,
    }
    for name, call in calls.items():
        with torch.device("meta"):
            found = call()
        assert found.device.type == "cpu", name
        assert found.double().isfinite().all(), name


@pytest.mark.parametrize(
    "make", [cf.LangevinSampler, cf.MALASampler, cf.UnderdampedLangevinSampler]
)
def test_what_cannot_be_read_is_said(make):
    x0 = torch.empty(4, 3, device="meta")
    with pytest.raises(ValueError, match="x0 is on the meta device and has no data"):
        make(lambda x: x.square().sum(1), n_steps=1, step_size=0.1)(x0, key=KEY)


@pytest.mark.parametrize(
    "make",
    [
        partial(cf.LangevinSampler, step_size=0.1, kernel=False),
        partial(cf.LangevinSampler, drift=0.01, kernel=False, momentum=0.5, noise=0.0),
        partial(cf.MALASampler, step_size=0.1, kernel=False),
        partial(cf.UnderdampedLangevinSampler, step_size=0.1, friction=1.0),
    ],
    ids=["langevin", "momentum", "mala", "underdamped"],
)
def test_chains_inside_a_function_that_torch_func_transforms(make: Any) -> None:
    """Contrastive divergence by torch.func: its gradient is that of autograd, whether the chain
    sees the parameters that are transformed or the module's own."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(6, 3)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def energy(y: Tensor, of: Any = None) -> Tensor:
        return net(y) if of is None else torch.func.functional_call(net, of, (y,))

    def loss(given: Any, seen: Any = None) -> Tensor:
        sampler = make(partial(energy, of=seen), n_steps=3)
        return energy(x, given).sum() - energy(sampler(x, key=cf.Key(0)).x, given).sum()

    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    expected = torch.autograd.grad(loss(leaves), list(leaves.values()))
    for found in (
        torch.func.grad(loss)(parameters),
        torch.func.grad(lambda given: loss(given, seen=given))(parameters),
    ):
        for one, other in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_options_are_made_where_they_are_read() -> None:
    """Whatever torch's default device."""
    x, centre, energy = torch.randn(6, 3), torch.ones(6, 3), cf.energies.DoubleWellEnergy(1.0)
    makers: list[Callable[[], Any]] = [
        lambda: cf.MALASampler(energy, n_steps=3, step_size=0.1),
        lambda: cf.MALASampler(energy, n_steps=3, step_size=[0.1, 0.2, 0.3]),
        lambda: cf.LangevinSampler(energy, n_steps=3, step_size=[0.1, 0.2, 0.3]),
        lambda: cf.LangevinSampler(energy, n_steps=3, step_size=0.1, pull=(centre, [1.0] * 6)),
    ]
    for make in makers:
        with torch.device("meta"):
            sampler = make()
        assert torch.equal(sampler(x, key=cf.Key(0)).x, make()(x, key=cf.Key(0)).x)
