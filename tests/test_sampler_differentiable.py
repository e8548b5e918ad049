"""Gradients through chains, and the memory that checkpoints save."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext.energies import MLPEnergy
from coopflow_ext.samplers import LangevinSampler

KEY = cf.Key(1)
OPTIONS = [
    {},
    {"noise_before_gradient": True},
    {"noise_before_gradient": True, "clamp": (-0.7, 0.9), "clamp_when": "both"},
    {"grad_norm": 0.2, "step_clip": 0.5, "clamp": (-3.0, 3.0)},
    {"reference_std": 1.5, "on_nonfinite": "ignore"},
]


@pytest.fixture
def energy() -> MLPEnergy:
    torch.manual_seed(0)
    return MLPEnergy(3, widths=(5, 5)).double()


@pytest.fixture
def x0() -> Tensor:
    return torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_gradcheck_in_x0_and_the_parameters(energy, x0, options, checkpoint_every):
    """T = 5, against finite differences."""
    names = [name for name, _ in energy.named_parameters()]

    def chain(x: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        sampler = LangevinSampler(
            lambda x: torch.func.functional_call(energy, parameters, (x,)),
            n_steps=5, step_size=0.4, differentiable=True, checkpoint_every=checkpoint_every,
            **options,
        )  # fmt: skip
        return sampler(x, key=KEY).x

    inputs = [x0, *(p.detach() for p in energy.parameters())]
    assert torch.autograd.gradcheck(chain, [t.clone().requires_grad_() for t in inputs])


# Values of a coefficient as callers may have them, from the learned vector (3,).
LEARNED = {
    "0-d": lambda v: v[0],
    "by step": lambda v: torch.cat([v, v[:1]]),
    "list": lambda v: [v[0], 0.2, v[1], 0.3],
    "callable": lambda v: lambda k: v[k % 3],
    "chains": lambda v: v[None],
}


def rows_of(values: object, n_steps: int) -> list[Tensor]:
    """What the schedule is at each step, (B or 1, 1), written out."""
    if callable(values) and not isinstance(values, Tensor):
        values = [values(k) for k in range(n_steps)]
    if isinstance(values, list):
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
    if values.ndim == 2:
        return [values.reshape(-1, 1)] * n_steps
    return [row.reshape(1, 1) for row in values.expand(n_steps)]


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("checkpoint_every", [None, 3])
@pytest.mark.parametrize(
    ("names", "more"),
    [
        (("step_size",), {}),
        (("drift",), {"reference_std": 1.5, "grad_clip": 0.5}),
        (("drift", "noise"), {"noise_before_gradient": True}),
        (("step_size", "temperature"), {"pull": (torch.ones(3, 3), 0.3), "clamp": (-1.0, 1.2)}),
    ],
)
def test_gradients_of_learned_coefficients_equal_a_plain_loop(
    energy, x0, kind, checkpoint_every, names, more
):
    n_steps, xi = 4, torch.randn(4, 3, 3, dtype=torch.float64)

    def plain(x: Tensor, given: dict) -> Tensor:
        for k in range(n_steps):
            at = {name: rows_of(values, n_steps)[k] for name, values in given.items()}
            drift = at["drift"] if "drift" in at else at["step_size"].square() / 2
            noise = (
                at.get("noise", (2 * drift).sqrt()) * at.get("temperature", x.new_ones(())).sqrt()
            )
            if "noise_before_gradient" in more:
                x = x + noise * xi[k]
            (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
            grad = grad.clamp(-more.get("grad_clip", 9.0), more.get("grad_clip", 9.0))
            if "reference_std" in more:
                grad = grad + x / more["reference_std"] ** 2
            if "pull" in more:
                grad = grad + more["pull"][1] * (x - more["pull"][0])
            x = x - drift * grad
            if "noise_before_gradient" not in more:
                x = x + noise * xi[k]
            x = x.clamp(*more.get("clamp", (-9.0, 9.0)))
        return x

    results = []
    for run in ("sampler", "loop"):
        x = x0.clone().requires_grad_()
        vectors = [torch.linspace(0.2, 0.5, 3).double().requires_grad_() for _ in names]
        given = {name: LEARNED[kind](v) for name, v in zip(names, vectors, strict=True)}
        if run == "loop":
            end = plain(x, given)
        else:
            sampler = LangevinSampler(energy, n_steps=n_steps, differentiable=True, **more,
                                      checkpoint_every=checkpoint_every, **given)  # fmt: skip
            end = sampler(x, xi=xi).x
        inputs = [*vectors, x, *energy.parameters()]
        results.append((end, *torch.autograd.grad(end.sin().sum(), inputs, allow_unused=True)))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all(grad[0] != 0 for grad in results[0][1 : 1 + len(names)])


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_in_step_sizes(energy, x0, options):
    """The key's own noise, a value for each step."""

    def chain(delta: Tensor, tau: Tensor) -> Tensor:
        sampler = LangevinSampler(energy, n_steps=4, step_size=delta, temperature=tau,
                                  differentiable=True, **options)  # fmt: skip
        return sampler(x0, key=KEY).x

    inputs = torch.linspace(0.3, 0.5, 4).double(), torch.tensor(0.8).double()
    assert torch.autograd.gradcheck(chain, [t.requires_grad_() for t in inputs])
    grad = torch.func.grad(lambda d: chain(d, inputs[1].detach()).sum())(inputs[0].detach())
    expected = torch.autograd.grad(chain(*inputs).sum(), inputs[0])[0]
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_that_a_step_size_is_learned_changes_no_bit(options, dtype):
    torch.manual_seed(0)
    net, x0 = MLPEnergy(3).to(dtype), torch.randn(4, 3).to(dtype)
    delta = torch.tensor(0.3, requires_grad=True)
    common = {"n_steps": 5, "differentiable": True, **options}
    fixed = LangevinSampler(net, step_size=delta.detach(), **common)(x0, key=KEY).x
    learned = LangevinSampler(net, step_size=delta, **common)(x0, key=KEY).x
    assert torch.equal(learned, fixed)
    (grad,) = torch.autograd.grad(learned.float().sum(), delta)
    assert grad.dtype == torch.float32
    assert grad.isfinite()


def test_a_sampler_follows_the_step_size_that_an_optimizer_changes(x0):
    """Made once, called at every iteration, as a layer of a model does."""
    delta = torch.nn.Parameter(torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64))
    sampler = LangevinSampler(
        lambda x: x.square().sum(1) / 2, n_steps=3, drift=delta, noise=0.0, differentiable=True
    )
    optimizer = torch.optim.SGD([delta], lr=0.05)
    losses = []
    for _ in range(30):
        loss = sampler(x0).x.square().mean()
        torch.testing.assert_close(loss, (x0 * (1 - delta).prod()).square().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.2 * losses[0]
    two = sampler(x0, n_steps=2).x
    torch.testing.assert_close(two, x0 * (1 - delta[:2]).prod())
    replaced = sampler(x0, drift=0.5).x
    assert (
        not replaced.requires_grad
        or not torch.autograd.grad(replaced.sum(), delta, allow_unused=True)[0]
    )
    with torch.no_grad():
        torch.testing.assert_close(sampler(x0).x, x0 * (1 - delta).prod())
        inside = LangevinSampler(
            lambda x: x.square().sum(1) / 2, n_steps=3, drift=delta, noise=0.0, differentiable=True
        )
    (grad,) = torch.autograd.grad(inside(x0).x.sum(), delta)
    assert grad.all()


def test_the_last_step_alone_gives_its_step_size_a_gradient(energy, x0):
    delta = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    grads = []
    for differentiable in (True, "last"):
        out = LangevinSampler(energy, n_steps=3, step_size=delta, differentiable=differentiable)(
            x0, key=KEY
        )
        grads.append(torch.autograd.grad(out.x.sum(), delta)[0])
    assert grads[0].all()
    assert not grads[1][:2].any()
    torch.testing.assert_close(grads[1][2], grads[0][2])


def test_a_learned_step_size_of_a_state_of_several_tensors(energy, x0):
    delta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    options = {"n_steps": 4, "drift": delta, "noise": 0.0, "grad_norm": 0.1, "grad_clip": 0.3,
               "differentiable": True}  # fmt: skip
    split = LangevinSampler(lambda s: energy(torch.cat(s, dim=1)), **options)(
        (x0[:, :1], x0[:, 1:])
    )
    whole = LangevinSampler(energy, **options)(x0).x
    grads = [torch.autograd.grad(x.sin().sum(), delta) for x in (torch.cat(split.x, 1), whole)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", [*OPTIONS, {"stats": True, "return_trajectory": True}])
def test_torch_funcs_transforms_agree_with_autograd(energy, x0, options):
    """With respect to x0, twice, and to parameters while x0 is a constant."""
    sampler = LangevinSampler(energy, n_steps=3, step_size=0.4, differentiable=True, **options)

    def loss(x: Tensor) -> Tensor:
        return sampler(x, key=KEY).x.square().sum()

    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = energy

        def forward(self, x: Tensor) -> Tensor:
            return loss(x)

    leaf = x0.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x0), torch.autograd.grad(loss(leaf), leaf)[0])
    torch.testing.assert_close(
        torch.func.jacrev(torch.func.grad(loss))(x0), torch.autograd.functional.hessian(loss, x0)
    )
    chain = Chain()
    parameters = {name: p.detach() for name, p in chain.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(chain, p, (x0,)))(parameters)
    expected = torch.autograd.grad(
        loss(x0), list(energy.parameters()), allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(tuple(grads.values()), expected)
    assert sum(bool(grad.any()) for grad in grads.values()) >= 4


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("checkpoint_every", [None, 1, 2, 7])
def test_same_states_as_the_fast_loop(energy, x0, options, checkpoint_every):
    common = {"n_steps": 6, "step_size": 0.4, "return_trajectory": True, "thin": 2, "stats": True,
              **options}  # fmt: skip
    plain = LangevinSampler(energy, **common)(x0, key=KEY)
    out = LangevinSampler(energy, differentiable=True, checkpoint_every=checkpoint_every, **common)(
        x0, key=KEY
    )
    torch.testing.assert_close(out.x, plain.x, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(out.trajectory, plain.trajectory, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(vars(out.stats), vars(plain.stats), rtol=1e-12, atol=1e-13)
    assert out.key == plain.key
    assert out.trajectory.requires_grad


@pytest.mark.parametrize("checkpoint_every", [1, 2, 4, 9])
def test_checkpoints_do_not_change_gradients(energy, x0, checkpoint_every):
    grads = []
    for every in (None, checkpoint_every):
        x = x0.clone().requires_grad_()
        sampler = LangevinSampler(
            energy, n_steps=8, step_size=0.4, differentiable=True, checkpoint_every=every,
            return_trajectory=True,
        )  # fmt: skip
        out = sampler(x, key=KEY)
        loss = out.x.square().sum() + out.trajectory[3].sum()
        grads.append(torch.autograd.grad(loss, [x, *energy.parameters()], allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


class _Packed:
    """A saved tensor, counted while something keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_after_forward(energy: MLPEnergy, x0: Tensor, n_steps: int, every: int | None) -> int:
    """Tensors that the graph of a chain holds between its forward and its backward pass."""
    packed: list[weakref.ref[_Packed]] = []

    def pack(tensor: Tensor) -> _Packed:
        holder = _Packed(tensor)
        packed.append(weakref.ref(holder))
        return holder

    x = x0.clone().requires_grad_()
    sampler = LangevinSampler(
        energy, n_steps=n_steps, step_size=0.1, differentiable=True, checkpoint_every=every
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        out = sampler(x, key=KEY)
    alive = sum(ref() is not None for ref in packed)
    out.x.sum().backward()
    assert x.grad is not None
    return alive


def test_checkpoints_bound_the_saved_tensors(energy, x0):
    full = saved_after_forward(energy, x0, 30, None)
    assert full == 3 * saved_after_forward(energy, x0, 10, None)
    for every in (1, 5, 30):
        kept = saved_after_forward(energy, x0, 30, every)
        segments = 30 // every
        assert kept <= 3 * segments  # the two masks and x of each segment
    assert saved_after_forward(energy, x0, 30, 5) * 20 < full


def test_checkpoints_cost_one_more_pass(energy, x0):
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return energy(x)

    sampler = LangevinSampler(
        counted, n_steps=12, step_size=0.1, differentiable=True, checkpoint_every=4
    )
    sampler(x0, key=KEY).x.sum().backward()
    assert calls == 12 + 12 + 1  # forward, recomputation, and one to find the parameters


def test_dropout_is_the_same_when_recomputed(x0):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Dropout(0.5), torch.nn.Linear(32, 1)
    ).double()
    grads = []
    for every in (None, 2):
        x = x0.clone().requires_grad_()
        sampler = LangevinSampler(
            net, n_steps=4, step_size=0.4, differentiable=True, checkpoint_every=every
        )
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(sampler(x, key=KEY).x.sum(), x)[0])
    torch.testing.assert_close(*grads)


class _OneForEachLevel(torch.nn.Module):
    """Whose parameters have their turns, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 1) for _ in range(4))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.layers[int(level)](x.tanh()).squeeze(1)


def test_checkpoints_find_parameters_of_every_step(x0):
    grads = []
    for every in (None, 1, 2):
        torch.manual_seed(0)
        net = _OneForEachLevel().double()
        sampler = LangevinSampler(
            net, n_steps=4, step_size=0.9, differentiable=True, checkpoint_every=every,
            step_kwargs={"level": torch.arange(4)},
        )  # fmt: skip
        sampler(x0, key=KEY).x.square().mean().backward()
        grads.append([layer.weight.grad for layer in net.layers])
    assert all(grad is not None for grad in grads[0])
    torch.testing.assert_close(grads[1:], [grads[0], grads[0]])


def test_checkpoints_refuse_to_lose_a_gradient(x0):
    """Of a tensor that no module owns and that the first step did not meet."""
    near, far = (torch.tensor(c, dtype=x0.dtype, requires_grad=True) for c in (1.0, 2.0))

    def energy(x: Tensor) -> Tensor:
        r = x.square().sum(1)
        return -(near if bool((r < 1).all()) else far) * r

    sampler = LangevinSampler(
        energy, n_steps=4, step_size=0.9, differentiable=True, checkpoint_every=2
    )
    out = sampler(torch.full_like(x0, 0.3), key=KEY).x
    with pytest.raises(RuntimeError, match=r"no parameters of a module.*in the first step"):
        out.sum().backward()


@pytest.mark.parametrize("by_step", [False, True])
def test_checkpoints_take_arguments_that_a_network_made(x0, by_step):
    grads = []
    for every in (None, 2):
        torch.manual_seed(0)
        table = torch.nn.Embedding(10, 3).double()
        numbers = torch.arange(4 * len(x0)) % 10
        label = table(numbers).view(4, len(x0), 3).tanh()
        sampler = LangevinSampler(
            lambda x, label: (x - label).square().sum(1), n_steps=4, step_size=0.5,
            differentiable=True, checkpoint_every=every,
            step_kwargs={"label": label} if by_step else None,
        )  # fmt: skip
        kwargs = {} if by_step else {"label": label[0]}
        out = sampler(x0, key=KEY, model_kwargs=kwargs).x
        (out.square().sum() + label.sum()).backward()
        grads.append(table.weight.grad)
    torch.testing.assert_close(*grads)


def test_checkpoints_leave_buffers_and_generators_alone(x0):
    """What finds the parameters is no pass of the chain. A graph that saved the buffers stays."""
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double()
    states = []
    for every in (None, 2):
        net[0].reset_running_stats()
        torch.manual_seed(5)
        sampler = LangevinSampler(
            net, n_steps=5, step_size=0.1, differentiable=True, checkpoint_every=every
        )
        sampler(x0, key=KEY)
        states.append([*map(torch.clone, net.buffers()), torch.rand(3)])
    torch.testing.assert_close(*states)
    net.eval()
    earlier = net(x0).sum()
    sampler(x0, key=KEY)
    earlier.backward()


def test_a_state_of_several_tensors(energy, x0):
    a, b = x0[:, :1].clone().requires_grad_(), x0[:, 1:].clone().requires_grad_()
    whole = x0.clone().requires_grad_()
    options = {"n_steps": 4, "drift": 0.2, "noise": 0.0, "grad_norm": 0.1, "grad_clip": 0.3,
               "differentiable": True}  # fmt: skip
    split = LangevinSampler(lambda s: energy(torch.cat(s, dim=1)), checkpoint_every=3, **options)
    out = split((a, b))
    expected = LangevinSampler(energy, **options)(whole).x
    torch.testing.assert_close(torch.cat(out.x, dim=1), expected)
    grads = torch.autograd.grad(out.x[0].sum() + out.x[1].sum(), (a, b))
    torch.testing.assert_close(torch.cat(grads, 1), torch.autograd.grad(expected.sum(), whole)[0])


def test_parameters_are_not_frozen_and_x0_is_kept(energy, x0):
    before = x0.clone()
    out = LangevinSampler(energy, n_steps=3, step_size=0.3, differentiable=True)(x0, key=KEY)
    out.x.sum().backward()
    assert energy.layers[0].weight.grad.abs().sum() > 0
    assert torch.equal(x0, before)
    assert not x0.requires_grad
    scored = LangevinSampler(score=lambda x: -x, n_steps=3, step_size=0.3, differentiable=True)
    x = x0.clone().requires_grad_()
    (grad,) = torch.autograd.grad(scored(x, key=KEY).x.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(grad, (1 - 0.045) ** 3))


def test_nonfinite_gradients_still_raise(x0):
    def energy(x):
        return torch.where(x > 0, torch.log(x - x), x).sum(1)

    with pytest.raises(cf.NonFiniteError) as caught:
        LangevinSampler(energy, n_steps=3, step_size=0.3, differentiable=True, checkpoint_every=2)(
            x0.clone().requires_grad_(), key=KEY
        )
    assert caught.value.step == 0
    assert caught.value.x.isfinite().all()
    assert not caught.value.x.requires_grad


def test_a_joint_norm_clip_of_zero_gradients_is_differentiable():
    """Of a state of several tensors, where the clip changes nothing."""
    a = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    b = torch.tensor([0.0, 1.0], requires_grad=True)
    ends = []
    for options in ({"grad_norm": 0.5}, {}):
        sampler = LangevinSampler(
            lambda s: (s[0].square().sum(1) + s[1].square()) / 2, n_steps=2, drift=0.1, noise=0.0,
            differentiable=True, **options,
        )  # fmt: skip
        x = sampler([a, b]).x
        ends.append(torch.autograd.grad(x[0].sum() + x[1].sum(), (a, b)))
    for clipped, plain in zip(*ends, strict=True):
        assert clipped.isfinite().all()
        torch.testing.assert_close(clipped[0], plain[0])


def test_a_joint_norm_clip_in_half_precision():
    """The norm is summed, and the drift's table made, in float32."""
    x0 = [torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)]
    x = LangevinSampler(
        lambda s: s[0].float().square().sum(1) + s[1].float().square(), n_steps=1, drift=0.5,
        noise=0.0, grad_norm=1.0,
    )(x0).x  # fmt: skip
    expected = 1 - 0.5 * 2 / 20**0.5
    for tensor in x:
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(
            tensor.float(), torch.full_like(tensor.float(), expected), atol=4e-3, rtol=0
        )


def test_clips_of_a_chain_that_stopped_have_no_derivatives():
    x0 = torch.tensor([[1.0], [1e14]], requires_grad=True)
    sampler = LangevinSampler(
        lambda x: x.pow(4).sum(1), n_steps=3, drift=0.01, noise=0.0, grad_norm=1.0,
        on_nonfinite="freeze", differentiable=True,
    )  # fmt: skip
    out = sampler(x0, key=cf.Key(0))
    (grad,) = torch.autograd.grad(out.x[0].sum(), x0)
    assert grad[0] > 0
    assert grad[1] == 0


@pytest.mark.parametrize("differentiable", [True, "last"])
@pytest.mark.parametrize("name", ["xi", "x_ref"])
def test_constants_of_the_derivative_are_not_detached_in_silence(differentiable, name):
    x0 = torch.randn(4, 3)
    given = {"xi": torch.randn(2, 4, 3), "x_ref": torch.zeros(4, 3)}
    given[name].requires_grad_()
    sampler = LangevinSampler(
        lambda x: x.square().sum(1), n_steps=2, step_size=0.1, pull=(None, 0.5),
        differentiable=differentiable,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"{name} is a constant of the derivative"):
        sampler(x0, **given)


@pytest.mark.parametrize("differentiable", [True, "last"])
def test_chains_that_did_not_stop_say_so(x0, differentiable):
    """``frozen_at`` is T for them, whatever part of the chain has derivatives."""

    def score(x: Tensor) -> Tensor:
        return torch.where(x > 50, torch.full_like(x, torch.nan), -x)

    start = torch.cat((x0.detach()[:1] * 0 + 60, x0.detach()[:2]))
    out = LangevinSampler(
        score=score, n_steps=4, step_size=0.1, differentiable=differentiable,
        on_nonfinite="freeze",
    )(start, key=KEY)  # fmt: skip
    assert out.frozen_at is not None
    assert out.frozen_at.tolist() == [0, 4, 4]


def test_a_chain_that_stopped_depends_on_its_start():
    """It ends where it stopped, so the derivative by x0 is 1."""

    def score(x: Tensor) -> Tensor:
        return torch.where(x > 5, torch.full_like(x, torch.nan), -x)

    start = torch.tensor([[6.0], [1.0]], dtype=torch.float64, requires_grad=True)
    out = LangevinSampler(
        score=score, n_steps=3, drift=0.1, noise=0.0, differentiable=True, on_nonfinite="freeze"
    )(start, key=KEY)
    (grad,) = torch.autograd.grad(out.x.sum(), start)
    torch.testing.assert_close(grad, torch.tensor([[1.0], [0.9**3]], dtype=torch.float64))


def test_checkpoints_compute_in_the_autocast_of_the_forward_pass(energy, x0):
    """Where the backward pass is outside of it."""

    def grads(every: int | None) -> tuple[Tensor, ...]:
        start = x0.detach().float().requires_grad_()
        sampler = LangevinSampler(
            energy.float(), n_steps=4, step_size=0.3, differentiable=True, checkpoint_every=every
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = sampler(start, key=KEY).x.square().sum()
        weights = [p for p in energy.parameters() if p.ndim > 1]
        return torch.autograd.grad(loss, [start, *weights])

    for one, other in zip(grads(None), grads(2), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_checkpoints_beside_frozen_parameters(energy, x0):
    """Those that are not learned get no gradient, and do not disturb the others."""
    frozen, *learned = [p for p in energy.parameters() if p.ndim > 1]
    frozen.requires_grad_(False)
    found = [
        torch.autograd.grad(
            LangevinSampler(
                energy, n_steps=4, step_size=0.3, differentiable=True, checkpoint_every=every
            )(x0, key=KEY).x.sum(),
            learned,
        )
        for every in (None, 2)
    ]
    assert frozen.grad is None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("n_steps", [0, 1, 2, 7])
@pytest.mark.parametrize(
    "options",
    [
        {"clamp": (-0.2, 0.3), "clamp_when": "end"},
        {"return_trajectory": True, "thin": 2, "stats": True},
        {"return_trajectory": True, "include_start": True, "thin": 3, "clamp": (-0.2, 0.3),
         "clamp_when": "end", "denoise": 0.1},
        {"noise_before_gradient": True, "return_trajectory": True, "include_start": True},
    ],
)  # fmt: skip
def test_a_last_step_with_derivatives_changes_no_state(energy, x0, n_steps, options):
    """It alone is the chain's last: its clamp, and its place in the trajectory."""
    common = {"n_steps": n_steps, "step_size": 0.4, **options}
    plain = LangevinSampler(energy, **common)(x0, key=KEY)
    out = LangevinSampler(energy, differentiable="last", **common)(x0, key=KEY)
    torch.testing.assert_close(out.x, plain.x, rtol=1e-13, atol=1e-14)
    assert out.key == plain.key
    if plain.trajectory is not None:
        torch.testing.assert_close(out.trajectory, plain.trajectory, rtol=1e-13, atol=1e-14)
    if plain.stats is not None:
        torch.testing.assert_close(vars(out.stats), vars(plain.stats), rtol=1e-12, atol=1e-13)


def test_the_last_step_alone_with_learned_noise_before_the_gradient(x0):
    """The steps before it take the values; x shrinks by 1 − drift in each."""
    noise = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    xi = torch.randn(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = LangevinSampler(
        lambda x: x.square().sum(1) / 2, n_steps=3, drift=0.1, noise=noise, differentiable="last",
        noise_before_gradient=True,
    )  # fmt: skip
    out = sampler(x0, xi=xi)
    expected = x0
    for row in xi:
        expected = 0.9 * (expected + 0.3 * row)
    torch.testing.assert_close(out.x, expected)
    (grad,) = torch.autograd.grad(out.x.sum(), noise)
    torch.testing.assert_close(grad, torch.stack([*grad[:2] * 0, 0.9 * xi[2].sum()]))


def test_recomputing_draws_nothing_from_torchs_generator(x0):
    net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(3, 1)).double()
    sampler = LangevinSampler(
        net, n_steps=4, step_size=0.4, differentiable=True, checkpoint_every=2
    )
    out = sampler(x0.clone().requires_grad_(), key=KEY)
    state = torch.get_rng_state()
    out.x.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpoints_take_an_argument_that_is_given_twice(x0):
    grads = []
    for every in (None, 2):
        label = torch.ones(3, dtype=torch.float64, requires_grad=True)
        sampler = LangevinSampler(
            lambda x, a, b: (x - a).square().sum(1) + (x - 2 * b[0]).square().sum(1), n_steps=4,
            step_size=0.4, differentiable=True, checkpoint_every=every,
        )  # fmt: skip
        out = sampler(x0, key=KEY, model_kwargs={"a": label, "b": [label]})
        grads.append(torch.autograd.grad(out.x.sum(), label)[0])
    torch.testing.assert_close(*grads)


def test_the_backward_pass_leaves_where_chains_stopped():
    def score(x):
        return torch.where(x > 3.5, torch.nan, torch.ones_like(x))

    x0 = torch.tensor([[0.0], [-50.0], [9.0]], requires_grad=True)
    sampler = cf.LangevinSampler(
        score=score, n_steps=8, drift=1.0, noise=0.0, differentiable=True, checkpoint_every=2,
        on_nonfinite="freeze",
    )  # fmt: skip
    out = sampler(x0, key=cf.Key(0))
    assert out.frozen_at.tolist() == [4, 8, 0]
    out.x.sum().backward()
    assert out.frozen_at.tolist() == [4, 8, 0]
