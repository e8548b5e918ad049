"""Bad input to LangevinSampler, and chains that blow up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext.energies import MLPEnergy
from coopflow_ext.samplers import LangevinSampler
from coopflow_ext.samplers.schedule import place


def energy(x: Tensor) -> Tensor:
    return 0.5 * x.square().flatten(1).sum(1)


X0 = torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "step_size.*drift"),
        ({"step_size": 0.1, "drift": 0.1}, ValueError, "step_size.*drift"),
        ({"step_size": 0.1, "noise": 0.1}, ValueError, "noise goes with drift"),
        ({"drift": 0.1, "noise": 0.1, "temperature": 1.0}, ValueError, "temperature and noise"),
        ({"drift": 0.1, "noise": -0.1}, ValueError, "noise must be ≥ 0"),
        ({"drift": float("nan")}, ValueError, "drift"),
        ({"drift": float("inf")}, ValueError, "drift"),
        ({"drift": "0.1"}, TypeError, "drift"),
        ({"drift": True}, TypeError, "drift must be a number"),
        ({"drift": torch.ones(5)}, ValueError, "drift must have one value for each of 3 steps"),
        ({"drift": [0.1, 0.2]}, ValueError, "drift must have one value for each of 3 steps"),
        ({"step_size": torch.ones(4)}, ValueError, r"for each of 4 chains give shape \(1, 4\)"),
        ({"drift": torch.ones(2, 4)}, ValueError, r"drift must be .*got shape \(2, 4\)"),
        ({"drift": torch.tensor([0.1, float("nan"), 0.1])}, ValueError, "drift must be finite"),
        ({"drift": lambda k: -1.0}, ValueError, "drift"),
        ({"drift": torch.ones(3, dtype=torch.complex64)}, TypeError, "drift must be real"),
        ({"drift": lambda k: None}, TypeError, r"drift\(0\) must be a number or a tensor"),
        ({"drift": lambda k: True}, TypeError, r"drift\(0\) must be .*got bool"),
        ({"drift": lambda k: torch.ones(2, 2)}, ValueError, r"drift\(0\) must be .*\(2, 2\)"),
        ({"drift": lambda k: torch.ones(3 + k)}, ValueError, "drift must have .*got 3 and 4 and 5"),
        (
            {"drift": torch.ones(1, 4), "temperature": torch.ones(1, 5)},
            ValueError,
            "got drift for 4 and temperature for 5",
        ),
        (
            {"step_size": torch.ones(1, 4), "pull": (X0, torch.ones(5))},
            ValueError,
            "got step_size for 4 and pull for 5",
        ),
        ({"step_size": 0.1, "temperature": -1.0}, ValueError, "temperature"),
        ({"step_size": 0.1, "grad_clip": 0.0}, ValueError, "grad_clip must be > 0"),
        ({"step_size": 0.1, "grad_norm": -1.0}, ValueError, "grad_norm"),
        ({"step_size": 0.1, "step_clip": float("nan")}, ValueError, "step_clip"),
        ({"step_size": 0.1, "clamp": (1.0, -1.0)}, ValueError, "clamp must be"),
        ({"step_size": 0.1, "clamp": (0.0, float("nan"))}, ValueError, "clamp must be"),
        ({"step_size": 0.1, "clamp": 1.0}, TypeError, "clamp must be a pair"),
        ({"step_size": 0.1, "clamp": (0.0, None)}, TypeError, "clamp must be a pair of numbers"),
        ({"step_size": 0.1, "clamp": ("0", 1.0)}, TypeError, "clamp must be a pair of numbers"),
        ({"step_size": 0.1, "negative_energy": 1}, TypeError, "negative_energy must be True or F"),
        ({"step_size": 0.1, "noise_before_gradient": 0.1}, TypeError, "noise_before_gradient must"),
        ({"step_size": 0.1, "return_trajectory": 3}, TypeError, "return_trajectory must be True"),
        ({"step_size": 0.1, "stats": "energy"}, TypeError, "stats must be True or False, got 'en"),
        ({"step_size": 0.1, "channels_last": None}, TypeError, "channels_last must be True or"),
        ({"step_size": 0.1, "compile": "inductor"}, TypeError, "compile must be True or False"),
        ({"step_size": 0.1, "clamp_when": "start"}, ValueError, "clamp_when"),
        ({"step_size": 0.1, "clamp_when": "noise"}, ValueError, "'noise' needs noise_before_grad"),
        ({"step_size": 0.1, "clamp_when": "both"}, ValueError, "'both' needs noise_before_grad"),
        ({"step_size": 0.1, "on_nonfinite": "stop"}, ValueError, "on_nonfinite"),
        ({"step_size": 0.1, "reference_std": 0.0}, ValueError, "reference_std"),
        ({"step_size": 0.1, "reference_std": 1e-200}, ValueError, "reference_std must have a sq"),
        ({"step_size": 0.1, "reference_std": 1e200}, ValueError, "reference_std must have a sq"),
        ({"step_size": 0.1, "pull": 1.0}, TypeError, "pull must be a pair"),
        ({"step_size": 0.1, "pull": (None, -1.0)}, ValueError, "strength"),
        ({"step_size": 0.1, "pull": (None, torch.ones(2, 4))}, ValueError, "strength must be a nu"),
        ({"step_size": 0.1, "pull": (None, "a")}, TypeError, "strength must be a number, got str"),
        ({"step_size": 0.1, "pull": (1.0, 1.0)}, TypeError, "pull's x_ref must be a tensor"),
        ({"step_size": 0.1, "thin": 0}, ValueError, "thin must be ≥ 1"),
        ({"step_size": 0.1, "n_steps": 2.0}, TypeError, "n_steps must be an int"),
        ({"step_size": 0.1, "n_steps": -1}, ValueError, "n_steps"),
        ({"step_size": 0.1, "n_steps": 2**32}, ValueError, r"n_steps must be < 2\*\*32, as far"),
        ({"step_size": 0.1, "autocast": torch.float32}, ValueError, "autocast"),
        ({"step_size": 0.1, "cuda_graph": "yes"}, ValueError, "cuda_graph"),
        ({"step_size": 0.1, "differentiable": "first"}, ValueError, "differentiable"),
        ({"step_size": 0.1, "checkpoint_every": 2}, ValueError, "checkpoint_every needs"),
        ({"step_size": 0.1, "cuda_graph": True, "differentiable": True}, ValueError, "cuda_graph"),
        ({"step_size": 0.1, "score": lambda x: -x}, ValueError, "exactly one of energy and score"),
        ({"step_size": 0.1, "negative_score": True}, TypeError, "negative_score"),
    ],
)
def test_options_are_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        LangevinSampler(energy, **{"n_steps": 3, **options})


def unasked(step: int) -> float:
    raise AssertionError("a schedule of more steps than a key counts was evaluated")


def test_too_many_steps_are_refused_before_a_schedule_is_evaluated():
    for kind in (LangevinSampler, cf.MALASampler, cf.UnderdampedLangevinSampler):
        with pytest.raises(ValueError, match=r"n_steps must be < 2\*\*32"):
            kind(energy, n_steps=2**32, step_size=unasked)
    with pytest.raises(ValueError, match=r"n_steps must be < 2\*\*32"):
        LangevinSampler(energy, n_steps=1, step_size=0.1)(X0, n_steps=2**40, step_size=unasked)


@pytest.mark.parametrize("kind", [LangevinSampler, cf.MALASampler, cf.UnderdampedLangevinSampler])
@pytest.mark.parametrize(
    ("kept", "what"), [("return_trajectory", "the trajectory"), ("stats", "statistics")]
)
def test_what_does_not_fit_says_how_many_bytes(kind, kept, what):
    """Petabytes, for which no machine has addresses."""
    sampler = kind(energy, n_steps=2**32 - 1, step_size=0.1, **{kept: True})
    with pytest.raises(RuntimeError, match=rf"^{what} of shape .* would take [\d,]+ bytes"):
        sampler(torch.zeros(100_000, 10), key=cf.Key(0))


LEARNED = nn.Parameter(torch.tensor(0.1))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"drift": LEARNED}, "drift"),
        ({"drift": 2 * LEARNED}, "drift"),
        ({"drift": [LEARNED, LEARNED, LEARNED]}, "drift"),
        ({"drift": LEARNED.expand(3, 4)}, "drift"),
        ({"drift": lambda k: LEARNED}, r"drift\(0\)"),
        ({"drift": lambda k: LEARNED.expand(4) if k == 2 else 0.1}, r"drift\(2\)"),
        ({"step_size": LEARNED.expand(3)}, "step_size"),
        ({"drift": 0.1, "noise": LEARNED}, "noise"),
        ({"drift": 0.1, "temperature": LEARNED}, "temperature"),
    ],
)
def test_coefficients_that_require_grad_need_a_differentiable_chain(options, name):
    match = f"^{name} must not require grad: .* without differentiable=True"
    with pytest.raises(ValueError, match=match):
        LangevinSampler(energy, n_steps=3, **options)


@pytest.mark.parametrize("differentiable", [False, True, "last"])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"pull": (X0, LEARNED)}, "pull's strength"),
        ({"pull": (X0, [LEARNED] * 4)}, "pull's strength"),
        ({"clamp": (-1, LEARNED)}, "clamp"),
    ],
)
def test_constants_that_require_grad_are_refused(options, name, differentiable):
    with pytest.raises(ValueError, match=f"^{name} must not require grad: .* not even through"):
        LangevinSampler(energy, n_steps=3, drift=0.1, differentiable=differentiable, **options)


@pytest.mark.parametrize("given", [LEARNED, lambda k: LEARNED, LEARNED.expand(1, 4)])
def test_coefficients_of_the_other_samplers_that_require_grad_are_refused(given):
    match = "must not require grad"
    with pytest.raises(ValueError, match=rf"^step_size.*{match}"):
        cf.MALASampler(energy, n_steps=3, step_size=given)
    for name in ("step_size", "friction", "temperature"):
        options = {"step_size": 0.1, name: given}
        with pytest.raises(ValueError, match=rf"^{name}.*{match}"):
            cf.UnderdampedLangevinSampler(energy, n_steps=3, **options)
    with pytest.raises(ValueError, match=rf"^step_size.*{match}"):
        cf.presets.vaebm(energy, n_steps=3, step_size=given)


def test_a_table_is_copied_when_the_sampler_is_made():
    table = torch.full((3,), 0.1, dtype=torch.float64)
    sampler = LangevinSampler(energy, n_steps=3, drift=table, noise=0.0)
    expected = sampler(X0).x
    table.fill_(-1.0)  # would not have passed the checks
    assert torch.equal(sampler(X0).x, expected)


def test_what_to_sample_is_refused_by_name():
    with pytest.raises(ValueError, match="exactly one of energy and score"):
        LangevinSampler(n_steps=3, step_size=0.1)
    with pytest.raises(TypeError, match="energy must be callable"):
        LangevinSampler(3.0, n_steps=3, step_size=0.1)
    with pytest.raises(TypeError, match="score must be callable"):
        LangevinSampler(score=3.0, n_steps=3, step_size=0.1)
    with pytest.raises(ValueError, match="negative_energy"):
        LangevinSampler(score=energy, n_steps=3, step_size=0.1, negative_energy=True)


class Unchanged:
    """x0 and the network's requires_grad must survive what happens inside."""

    def __init__(self) -> None:
        self.net = MLPEnergy(3)
        next(self.net.parameters()).requires_grad_(False)
        self.before = [p.requires_grad for p in self.net.parameters()]

    def check(self) -> None:
        assert [p.requires_grad for p in self.net.parameters()] == self.before


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module, change) -> None:
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.net(x))


def change_a_parameter(net: nn.Module):
    def change(u):
        with torch.no_grad():
            next(net.parameters()).add_(0.0)
        return u

    return change


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda u: u.sum(), ValueError, r"energy must return .*\(4,\).*got shape \(\)"),
        (lambda u: u[:3], ValueError, r"got shape \(3,\)"),
        (lambda u: u[:, None, None], ValueError, r"got shape \(4, 1, 1\)"),
        (lambda u: u[:, None].expand(4, 2), ValueError, r"got shape \(4, 2\)"),
        (lambda u: u.detach(), ValueError, "detached"),
        (lambda u: u.long(), TypeError, "energy must return floating-point numbers"),
        (lambda u: u.tolist(), TypeError, "energy must return a tensor, got list"),
        (lambda u: 1 / 0, ZeroDivisionError, "division"),
        ("parameter", ValueError, "energy changed its parameters"),
    ],
)
@pytest.mark.parametrize("stats", [False, True])
def test_energies_are_refused(change, error, match, stats):
    guard = Unchanged()
    change = change_a_parameter(guard.net) if change == "parameter" else change
    x0 = X0.clone()
    sampler = LangevinSampler(Wrapped(guard.net, change), n_steps=3, step_size=0.1, stats=stats)
    with pytest.raises(error, match=match):
        sampler(x0)
    guard.check()
    assert torch.equal(x0, X0)


def test_an_energy_that_ignores_a_tensor_of_the_state():
    with pytest.raises(ValueError, match="does not depend on tensor 1"):
        LangevinSampler(lambda s: energy(s[0]), n_steps=1, step_size=0.1)([X0, X0])


@pytest.mark.parametrize(
    ("score", "error", "match"),
    [
        (lambda x: x.sum(1), ValueError, r"score must have the shape of x, \(4, 3\), got \(4,\)"),
        (lambda x: x.long(), TypeError, "score must return floating-point"),
        (lambda x: [x, x], TypeError, r"score must return 1 tensor"),
        (lambda x: None, TypeError, "score must return"),
    ],
)
def test_scores_are_refused(score, error, match):
    with pytest.raises(error, match=match):
        LangevinSampler(score=score, n_steps=3, step_size=0.1)(X0)


@pytest.mark.parametrize(
    ("x0", "call", "error", "match"),
    [
        (X0.long(), {}, TypeError, "x0 must be floating point, got torch.int64"),
        (torch.tensor(1.0), {}, ValueError, "x0 must be"),
        (3.0, {}, TypeError, "x0 must be a tensor"),
        ([], {}, TypeError, "x0 must be a tensor or a non-empty"),
        ([X0, X0[:2]], {}, ValueError, "same number of chains"),
        (X0, {"xi": torch.zeros(2, 4, 3)}, ValueError, r"xi must have shape \(3, 4, 3\)"),
        (X0, {"xi": [0.0]}, TypeError, "xi must be a tensor"),
        (X0, {"x_ref": X0}, ValueError, "x_ref needs the option pull"),
        (X0, {"key": cf.Key(0, time=2**32 - 2)}, OverflowError, "fold_in"),
    ],
)
def test_calls_are_refused(x0, call, error, match):
    with pytest.raises(error, match=match):
        LangevinSampler(energy, n_steps=3, step_size=0.1)(x0, **call)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("drift", {}),
        ("step_size", {}),
        ("noise", {"drift": 0.1}),
        ("temperature", {"step_size": 0.1}),
        ("pull", {"step_size": 0.1}),
    ],
)
def test_values_per_chain_must_fit_the_batch(name, others):
    value = (X0, [1.0] * 5) if name == "pull" else torch.ones(1, 5)
    sampler = LangevinSampler(energy, n_steps=3, **{name: value, **others})
    with pytest.raises(ValueError, match=f"{name} has values for 5 chains, but x0 has 4"):
        sampler(X0)


def test_numbers_may_be_numpys():
    """As configurations read them."""
    sampler = LangevinSampler(
        energy, n_steps=np.int64(3), drift=np.float32(0.25), noise=0.5, grad_clip=np.float32(0.5),
        clamp=(np.float64(-1), torch.tensor(1.0)),
    )  # fmt: skip
    plain = LangevinSampler(
        energy, n_steps=3, drift=0.25, noise=0.5, grad_clip=0.5, clamp=(-1.0, 1.0)
    )
    assert torch.equal(sampler(X0, key=cf.Key(1)).x, plain(X0, key=cf.Key(1)).x)


def test_options_that_need_a_kind_of_x0():
    with pytest.raises(ValueError, match="channels_last needs x0"):
        LangevinSampler(energy, n_steps=1, step_size=0.1, channels_last=True)(X0)
    with pytest.raises(ValueError, match="cuda_graph=True needs x0 on a CUDA device"):
        LangevinSampler(energy, n_steps=1, step_size=0.1, cuda_graph=True)(X0)
    with pytest.raises(ValueError, match="x_ref must have shape"):
        LangevinSampler(energy, n_steps=1, step_size=0.1, pull=(X0, 1.0))(X0[:2])


class BlowsUp:
    """A quadratic whose gradient is NaN in one chain from the third call on."""

    def __init__(self, chain: int = 2) -> None:
        self.chain, self.calls = chain, 0

    def __call__(self, x: Tensor | list[Tensor]) -> Tensor:
        x = x if isinstance(x, Tensor) else x[1] + 0 * x[0]
        self.calls += 1
        factor = torch.ones(len(x))
        if self.calls > 2:
            factor[self.chain] = float("nan")
        return 0.5 * factor * x.square().flatten(1).sum(1)


@pytest.mark.parametrize("noise_first", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_chain_keeps_its_last_finite_state(noise_first, several, differentiable):
    options = {"drift": 0.1, "noise": 0.1, "noise_before_gradient": noise_first,
               "differentiable": differentiable}  # fmt: skip
    x0 = [X0, X0] if several else X0
    key = cf.Key(3)

    def last(state):
        return torch.stack(state) if several else state

    two = LangevinSampler(BlowsUp(), n_steps=2, **options)(x0, key=key)
    sampler = LangevinSampler(
        BlowsUp(), n_steps=6, on_nonfinite="freeze", stats=True, return_trajectory=True, **options
    )
    out = sampler(x0, key=key)
    x = last(out.x)
    assert x.isfinite().all()
    assert out.frozen_at.tolist() == [6, 6, 2, 6]
    assert torch.equal(x[..., 2, :], last(two.x)[..., 2, :])
    trajectory = last(out.trajectory)
    assert torch.equal(trajectory[..., -1, 2, :], x[..., 2, :])
    assert torch.equal(trajectory[..., 2, 2, :], x[..., 2, :])
    assert (out.stats.nonfinite[:, 2] > 0).tolist() == [False, False, True, True, True, True]

    healthy = LangevinSampler(lambda s: energy(s[1] + 0 * s[0] if several else s), n_steps=6,
                              **options)(x0, key=key)  # fmt: skip
    others = [0, 1, 3]
    torch.testing.assert_close(x[..., others, :], last(healthy.x)[..., others, :])

    with pytest.raises(cf.NonFiniteError, match="first at step 2") as caught:
        LangevinSampler(BlowsUp(), n_steps=6, **options)(x0, key=key)
    assert caught.value.step == 2
    assert caught.value.chains.tolist() == [2]
    kept = caught.value.x
    assert torch.equal(torch.stack(kept) if several else kept, x)


def test_ignore_lets_a_chain_go():
    out = LangevinSampler(BlowsUp(), n_steps=6, step_size=0.1, on_nonfinite="ignore")(X0)
    assert out.x[2].isnan().all()
    assert out.x[[0, 1, 3]].isfinite().all()
    assert out.frozen_at is None


@pytest.mark.parametrize(
    "option",
    [
        {"drift": 1e300},
        {"noise": 1e39, "drift": 0.1},
        {"drift": torch.tensor([0.1, 1e300, 0.1], dtype=torch.float64)},
        {"drift": 0.1, "pull": (torch.zeros(4, 2), 1e300)},
        {"step_size": 1e-3, "reference_std": 1e-30},
        {"step_size": 1e200},
    ],
)
@pytest.mark.parametrize("kernel", [False, True])
def test_coefficients_beyond_float32_are_named(option, kernel):
    """They would be infinite in the kernels; a float64 state takes them where they fit."""
    energy = cf.energies.DoubleWellEnergy(1.0)
    sampler = LangevinSampler(energy, n_steps=3, kernel=kernel, **option)
    with pytest.raises(
        ValueError, match=r"(drift|noise|decay|pull) must be finite in float32, got"
    ):
        sampler(torch.zeros(4, 2), key=cf.Key(1))


def test_a_step_size_of_mala_beyond_float32_is_named():
    sampler = cf.MALASampler(cf.energies.DoubleWellEnergy(1.0), n_steps=3, step_size=1e39)
    with pytest.raises(ValueError, match="step_size must be finite in float32, got 1e"):
        sampler(torch.zeros(4, 2), key=cf.Key(1))


def test_autocast_where_torch_has_none_is_refused() -> None:
    sampler = LangevinSampler(
        energy, drift=0.1, n_steps=2, autocast=torch.bfloat16, on_nonfinite="ignore"
    )
    with pytest.raises(ValueError, match=r"autocast: torch has none .* which is 'meta'"):
        sampler(X0.to("meta"), key=cf.Key(0))


@pytest.mark.parametrize("name", ["kernel", "cuda_graph"])
def test_a_number_is_no_switch(name):
    with pytest.raises(ValueError, match=f"{name} must be one of True, False, 'auto', got 0"):
        LangevinSampler(lambda x: x.sum(1), n_steps=1, step_size=0.1, **{name: 0})


def test_bounds_that_are_allowed():
    largest = float(np.finfo(np.float32).max)
    assert place("drift", largest, X0) == largest
    with pytest.raises(ValueError, match="drift must be finite in float32"):
        place("drift", 2 * largest, X0)
    assert place("drift", 2 * largest, X0.double()) == 2 * largest
    out = LangevinSampler(energy, n_steps=1, step_size=0.1, clamp=(0.5, 0.5))(X0)
    assert torch.equal(out.x, torch.full_like(X0, 0.5))
    assert LangevinSampler(energy, n_steps=0, step_size=0.1, momentum=0.0)(X0).x.equal(X0)
    with pytest.raises(ValueError, match="checkpoint_every needs differentiable=True"):
        LangevinSampler(energy, n_steps=1, step_size=0.1, differentiable="last", checkpoint_every=1)
    with pytest.raises(ValueError, match=r"x_ref needs the option pull=\(None, strength\)"):
        LangevinSampler(energy, n_steps=1, step_size=0.1)(X0, x_ref=X0)
    with pytest.raises(TypeError, match="pull must be a pair"):
        LangevinSampler(energy, n_steps=1, step_size=0.1, pull=(X0, 1.0, 2.0))
    with pytest.raises(ValueError, match="negative_energy belongs to energy"):
        LangevinSampler(score=lambda x: -x, n_steps=1, step_size=0.1, negative_energy=True)


def test_eight_chains_are_named():
    def score(x: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan)

    for count, shown in ((8, "0, 1, 2, 3, 4, 5, 6, 7"), (9, "0, 1, 2, 3, 4, 5, 6, 7, …")):
        with pytest.raises(cf.NonFiniteError, match=rf"in {count} of {count} chains \({shown}\)"):
            LangevinSampler(score=score, n_steps=1, step_size=0.1)(torch.zeros(count, 1))


@pytest.mark.parametrize("first", [False, True])
def test_a_score_of_several_tensors_some_of_which_want_gradients(first):
    scale = nn.Parameter(torch.tensor(1.0))
    state = torch.ones(2, 3), torch.ones(2, 1)

    def score(s: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        learned, plain = -scale * s[0 if first else 1], -s[1 if first else 0]
        return (learned, plain) if first else (plain, learned)

    out = LangevinSampler(score=score, n_steps=2, drift=0.5, noise=0.0)(state)
    for x, start in zip(out.x, state, strict=True):
        assert not x.requires_grad
        assert torch.equal(x, start / 4)


def test_tables_without_values_are_refused():
    for table in (torch.ones(1, 0), torch.ones(3, 0)):
        with pytest.raises(ValueError, match=r"drift must be a number, \(3,\) or"):
            LangevinSampler(energy, n_steps=3, drift=table)
    with pytest.raises(ValueError, match="drift must be a dense tensor with data, got one of"):
        LangevinSampler(energy, n_steps=3, drift=torch.ones(3, device="meta"))


def test_a_score_that_differentiates_by_itself():
    """Where the caller has gradients on, as in a plain loop."""

    def score(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return -torch.autograd.grad(energy(leaf).sum(), leaf)[0]

    out = LangevinSampler(score=score, n_steps=2, drift=0.5, noise=0.0)(X0)
    assert torch.equal(out.x, X0 / 4)


@pytest.mark.parametrize("kind", [LangevinSampler, cf.MALASampler])
def test_whole_chain_kernels_take_strided_starts_and_promise_a_device(kind):
    net, wide = MLPEnergy(3), torch.randn(4, 6)
    sampler = kind(net, n_steps=2, step_size=0.1, kernel=True)
    ends = [sampler(x, key=cf.Key(0)).x for x in (wide[:, ::2], wide[:, ::2].contiguous())]
    assert torch.equal(*ends)
    required = kind(net, n_steps=2, step_size=0.1, kernel=True, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph=True needs x0 on a CUDA device"):
        required(X0)
