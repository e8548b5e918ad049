"""Bad input of the Langevin ops: named, and nothing is changed."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import coopflow_ext as cf

KEY = cf.Key(5)

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "grad dtype": ({"grad": torch.zeros(4, 6, dtype=torch.float64)}, TypeError, "grad: .*float64"),
    "grad in float32": (
        {"x": torch.zeros(4, 6).half()},
        TypeError,
        "grad: .*float16, got dtype float32",
    ),
    "grad shape": ({"grad": torch.zeros(4, 5)}, ValueError, r"grad: .*\(4, 6\), got \(4, 5\)"),
    "grad None": ({"grad": None}, TypeError, "grad"),
    "grad list": ({"grad": [1.0]}, TypeError, "grad"),
    "x integer": ({"x": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "x: .*int64"),
    "x scalar": (
        {"x": torch.zeros(()), "grad": torch.zeros(())},
        ValueError,
        "x: must have a batch",
    ),
    "x transposed": (
        {"x": torch.zeros(6, 4).t(), "grad": torch.zeros(6, 4).t()},
        ValueError,
        "x: must be dense",
    ),
    "x strided": (
        {"x": torch.zeros(4, 12)[:, ::2], "grad": torch.zeros(4, 6)},
        ValueError,
        "x: must be dense",
    ),
    "x expanded": ({"x": torch.zeros(1, 6).expand(4, 6)}, ValueError, "x: must be dense"),
    "grad sparse": ({"grad": torch.zeros(4, 6).to_sparse()}, ValueError, "must be dense.*Sparse"),
    "drift NaN": ({"drift": math.nan}, ValueError, "drift: must be finite, got nan"),
    "drift beyond float32": ({"drift": 1e300}, ValueError, r"drift: .* in float32, got 1e\+300"),
    "noise beyond float32": ({"noise": 4e38}, ValueError, r"noise: .* in float32, got 4e\+38"),
    "drift text": ({"drift": "a"}, TypeError, "drift"),
    "drift None": ({"drift": None}, TypeError, "drift .*float or a tensor, got None"),
    "noise None": ({"noise": None}, TypeError, "noise .*float or a tensor, got None"),
    "noise negative": ({"noise": -0.1}, ValueError, "noise: must not be negative, got -0.1"),
    "noise infinite": ({"noise": math.inf}, ValueError, "noise: must be finite"),
    "decay NaN": ({"decay": math.nan}, ValueError, "decay: must be finite"),
    "pull alone": ({"pull": 0.1}, ValueError, "pull: needs x_ref"),
    "pull NaN": ({"pull": math.nan, "x_ref": torch.zeros(4, 6)}, ValueError, "pull: must be"),
    "table 1-D": ({"drift": torch.ones(4)}, ValueError, r"drift: must have shape \(T or 1, B"),
    "table wide": ({"drift": torch.ones(1, 3)}, ValueError, r"with B = 4, got \(1, 3\)"),
    "table short": (
        {"drift": torch.ones(3, 1), "step": 3},
        ValueError,
        "row 3 was asked .* 3 rows",
    ),
    "table short for noise after": (
        {"noise": torch.ones(3, 1), "step": 2, "noise_when": 1},
        ValueError,
        "row 3 was asked",
    ),
    "table dtype": ({"noise": torch.ones(1, 1).half()}, TypeError, "noise: .*float32 or float64"),
    "table of numpy": ({"drift": torch.ones(1, 4).numpy()}, TypeError, "'drift' .*'ndarray'"),
    "grad of numpy": ({"grad": torch.ones(4, 6).numpy()}, TypeError, "'grad' .*'ndarray'"),
    "rng dtype": ({"rng": torch.zeros(2)}, TypeError, "rng: must have dtype int64"),
    "rng Key": ({"rng": KEY}, TypeError, "'rng' .*'Key'"),
    "rng shape": ({"rng": torch.zeros(4, dtype=torch.int64)}, ValueError, r"rng: .*\(4,\)"),
    "grad_clip": ({"grad_clip": 0.0}, ValueError, "grad_clip: must be positive, got 0"),
    "grad_norm": ({"grad_norm": -1.0}, ValueError, "grad_norm: must be positive"),
    "step_clip": ({"step_clip": math.nan}, ValueError, "step_clip: must be positive, got nan"),
    "clamp reversed": ({"clamp": (1.0, -1.0)}, ValueError, r"clamp: .*got \(1, -1\)"),
    "clamp number": ({"clamp": 1.0}, ValueError, r"clamp must be \(low, high\), got 1.0"),
    "clamp of three": ({"clamp": (0, 1, 2)}, ValueError, r"clamp must be .*got \(0, 1, 2\)"),
    "clamp NaN": ({"clamp": (math.nan, 1.0)}, ValueError, "clamp: must be"),
    "noise_when": ({"noise_when": 3}, ValueError, "noise_when: must be 0, 1 or 2, got 3"),
    "step negative": ({"step": -1}, ValueError, "step: must be in"),
    "step beyond 64 bits": ({"step": 2**70}, ValueError, "step.*beyond 64 bits"),
    "rng of two": ({"rng": torch.zeros(2, dtype=torch.int64)}, ValueError, "rng: .*Key.tensor.*2,"),
    "xi shape": ({"xi": torch.zeros(4, 5), "noise": 0.1}, ValueError, "xi: must have the shape"),
    "xi dtype": ({"xi": torch.zeros(4, 6).double(), "noise": 0.1}, TypeError, "xi: .*float64"),
    "x_ref shape": ({"x_ref": torch.zeros(6)}, ValueError, "x_ref: must have the shape"),
    "x_low dtype": ({"x_low": torch.zeros(4, 6)}, TypeError, "x_low: .*bfloat16 or float16"),
    "x_low strides": ({"x_low": torch.zeros(6, 4).half().t()}, ValueError, "x_low: .*strides"),
    "stats shape": ({"stats": torch.zeros(4, 4)}, ValueError, r"stats: must have shape \(4, 5\)"),
    "stats dtype": ({"stats": torch.zeros(4, 5).double()}, TypeError, "stats: .*float32"),
    "active dtype": ({"active": torch.ones(4)}, TypeError, "active: must have dtype bool"),
    "active shape": ({"active": torch.ones(3).bool()}, ValueError, r"active: .*\(4,\), got \(3,\)"),
    "freeze alone": ({"freeze_nonfinite": True}, ValueError, "freeze_nonfinite: needs active"),
    "frozen_at alone": ({"frozen_at": torch.zeros(4).long()}, ValueError, "needs freeze_nonfinite"),
    "frozen_at dtype": (
        {
            "frozen_at": torch.zeros(4),
            "active": torch.ones(4).bool(),
            "freeze_nonfinite": True,
        },
        TypeError,
        "frozen_at: must have dtype int64",
    ),
    "unknown option": ({"momentum": 0.9}, TypeError, "momentum"),
}


def as_it_lies(value: Any, device: torch.device) -> Any:
    """A tensor on the device with its strides: ``to`` makes what has gaps or overlaps dense."""
    if not isinstance(value, Tensor):
        return value
    if value.layout != torch.strided:
        return value.to(device)
    n = value.untyped_storage().nbytes() // value.element_size()
    return value.as_strided((n,), (1,), 0).to(device).as_strided(value.shape, value.stride())


@pytest.mark.parametrize("name", BAD)
def test_bad_input_lies_on_another_device_as_it_does_here(name: str) -> None:
    for value in BAD[name][0].values():
        if isinstance(value, Tensor) and value.layout == torch.strided:
            assert as_it_lies(value, torch.device("meta")).stride() == value.stride()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(device: torch.device, name: str) -> None:
    overrides, error, message = BAD[name]
    given = {key: as_it_lies(value, device) for key, value in overrides.items()}
    x = given.pop("x", torch.ones(4, 6, device=device))
    grad = given.pop("grad", torch.ones(4, 6, device=device))
    rng = given.pop("rng", KEY.tensor(device))
    before = x.clone()
    with pytest.raises(error, match=message):
        cf.ops.langevin_step_(x, grad, rng, **{"drift": 0.1, **given})
    assert torch.equal(x, before)


XI, STATS = torch.ones(2, 4, 6), torch.ones(2, 4, 5)


@pytest.mark.parametrize(
    ("options", "step", "message"),
    [
        ({"drift": math.nan}, 0, "drift: must be finite"),
        ({"noise": -1.0}, 0, "noise: must not be negative"),
        ({"grad_clip": 0.0}, 0, "grad_clip: must be"),
        ({"clamp": (1.0, -1.0)}, 0, "clamp: must be"),
        ({"noise_when": 3}, 0, "noise_when: must be 0, 1 or 2, got 3"),
        ({"pull": 0.1}, 0, "pull: needs x_ref"),
        ({"freeze_nonfinite": True}, 0, "freeze_nonfinite: needs active"),
        ({"drift": torch.ones(2, 1)}, 2, "step: row 2 was asked of a coefficient table with 2"),
        ({"xi": XI[0]}, 0, "xi: must have a row of the shape of x"),
        ({"xi": XI[:, :3]}, 0, "xi: must have a row of the shape of x"),
        ({"xi": XI.double()}, 0, "xi: must have dtype float32"),
        ({"xi": XI.mT.contiguous().mT}, 0, "xi: must have the strides"),
        ({"xi": XI}, 2, "xi: row 2 was asked of a tensor with 2 rows"),
        ({"xi": XI, "noise_when": 1}, 1, "xi: row 2 was asked of a tensor with 2 rows"),
        ({"stats": STATS[0]}, 0, r"stats: must have shape \(T, 4, 5\)"),
        ({"stats": STATS}, 2, "stats: row 2 was asked of a tensor with 2 rows"),
        ({}, -1, "step: must be in"),
    ],
)
def test_bad_options_of_a_bound_step(
    device: torch.device, options: dict[str, Any], step: int, message: str
) -> None:
    x, grad, rng = (
        torch.ones(4, 6, device=device),
        torch.ones(4, 6, device=device),
        KEY.tensor(device),
    )
    given = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
    with pytest.raises((ValueError, TypeError), match=f"coopflow::langevin_bound_step_: {message}"):
        cf.ops.BoundStep(**{"drift": 0.1, "noise": 0.1, **given}).in_place(x, rng)(grad, step)
    assert (x == 1).all()


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (torch.ones(4, 5), ValueError, "grad: must have the shape of x"),
        (torch.ones(4, 6).double(), TypeError, "grad: must have dtype float32"),
        (torch.ones(4, 6, device="meta"), ValueError, "grad: must be on the device of x"),
        (None, TypeError, "grad"),
    ],
)
def test_bad_gradients_of_a_bound_step(
    device: torch.device, grad: Any, error: type[Exception], message: str
) -> None:
    x = torch.ones(4, 6, device=device)
    if isinstance(grad, Tensor) and not grad.is_meta:
        grad = grad.to(device)
    move = cf.ops.BoundStep(drift=0.1).in_place(x, KEY.tensor(device))
    with pytest.raises(error, match=message):
        move(grad, 0)
    assert (x == 1).all()


def test_a_bound_step_is_that_of_its_state(device: torch.device) -> None:
    """And of the size it had then: its memory is written without another look."""
    x, grad = torch.ones(4, 6, device=device), torch.ones(4, 6, device=device)
    bound = torch.ops.coopflow.langevin_bind(x, KEY.tensor(device), drift=0.5)
    step = torch.ops.coopflow.langevin_bound_step_
    for other in (x.clone(), x[:3], x[1:]):
        with pytest.raises(RuntimeError, match="x: must be the tensor that was bound"):
            step(other, grad, bound, 0)
    step(x, grad, bound, 0)
    assert (x == 0.5).all()
    x.resize_(2, 6)
    with pytest.raises(RuntimeError, match="x: must be the tensor that was bound"):
        step(x, grad, bound, 0)
    torch.ops.coopflow.langevin_unbind(bound)
    with pytest.raises(RuntimeError, match=f"bound: nothing is bound as {bound}"):
        step(x, grad, bound, 0)
    torch.ops.coopflow.langevin_unbind(bound)
    assert (x == 0.5).all()


def test_a_bound_step_keeps_its_tensors_as_long_as_it_is_used(device: torch.device) -> None:
    x, grad = torch.ones(4, 6, device=device), torch.zeros(4, 6, device=device)
    x_ref = torch.zeros(4, 6, device=device)
    gone = weakref.ref(x_ref)
    move = cf.ops.BoundStep(drift=0.1, pull=0.5, x_ref=x_ref).in_place(x, KEY.tensor(device))
    del x_ref
    gc.collect()
    move(grad, 0)
    assert (x == 0.5).all()
    del move
    gc.collect()
    assert gone() is None


def test_a_lazily_negated_state_is_named(device: torch.device) -> None:
    storage = torch.ones(4, 6, device=device)
    x, grad, rng = torch._neg_view(storage), torch.ones(4, 6, device=device), KEY.tensor(device)
    for call in (
        lambda: cf.ops.langevin_step_(x, grad, rng, drift=0.1),
        lambda: cf.ops.langevin_noise_(x, rng, noise=0.1),
    ):
        with pytest.raises(ValueError, match="x is a lazily negated view"):
            call()
    assert (storage == 1).all()
    # As a gradient it is read like any other.
    out = cf.ops.langevin_step_(torch.zeros(4, 6, device=device), x, rng, drift=0.5)
    assert (out == 0.5).all()


def assert_a_foreign_tensor_is_named(name: str, device: Any, other: str) -> None:
    given: dict[str, Any] = {
        "x": torch.ones(4, 6, device=device),
        "grad": torch.ones(4, 6, device=device),
        "rng": KEY.tensor(device),
        "drift": torch.ones(1, 4, device=device),
        "xi": torch.ones(4, 6, device=device),
        "stats": torch.ones(4, 5, device=device),
        "active": torch.ones(4, dtype=torch.bool, device=device),
    }
    given[name] = given[name].to(other)
    x, grad, rng = (given.pop(key) for key in ("x", "grad", "rng"))
    with pytest.raises(ValueError, match=f"{name}: must be on the device of x"):
        cf.ops.langevin_step_(x, grad, rng, noise=0.1, **given)
    assert (x == 1).all()


FOREIGN = ["grad", "rng", "drift", "xi", "stats", "active"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_tensor_without_data_is_named(device: torch.device, name: str) -> None:
    """One "meta" tensor sends the call to the fake kernel, which must not pass for a step."""
    assert_a_foreign_tensor_is_named(name, device, "meta")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOREIGN)
def test_mixed_devices_are_named(name: str) -> None:
    assert_a_foreign_tensor_is_named(name, "cuda", "cpu")


# --- memory that is shared ------------------------------------------------------------------------


def overlapping(name: str, device: torch.device) -> dict[str, Any]:
    """Arguments of a step of which two share memory."""
    floats, words = torch.ones(64, device=device), torch.arange(12, device=device)
    x, behind = floats[:16].view(4, 4), floats[1:17].view(4, 4)
    grad, rng = torch.ones(4, 4, device=device), KEY.tensor(device)
    active = torch.ones(4, dtype=torch.bool, device=device)
    masked = {"active": active, "freeze_nonfinite": True}
    stats = floats[16:36].view(4, 5)
    low = torch.zeros(20, dtype=torch.bfloat16, device=device)
    cases: dict[str, dict[str, Any]] = {
        "x, grad": {"grad": behind},
        "x, grad transposed": {"grad": x.t()},
        "x, grad expanded": {"grad": x[:1].expand(4, 4)},
        "x, grad of half precision": {"grad": floats.view(torch.bfloat16)[:16].view(4, 4)},
        "x, x_ref": {"x_ref": behind},
        "x, xi": {"xi": behind},
        "x, rng": {"rng": floats.view(torch.int64)[7:10]},
        "x, drift": {"drift": floats[15:16].view(1, 1)},
        "x, noise": {"noise": floats[:4].view(1, 4)},
        "x, decay": {"decay": floats[12:16].view(4, 1)},
        "x, pull": {"pull": floats[:4].view(1, 4), "x_ref": grad},
        "x_low, x": {"x_low": floats.view(torch.bfloat16)[16:32].view(4, 4)},
        "x_low, grad": {"x_low": low[:16].view(4, 4), "grad": low[4:].view(4, 4)},
        "stats, x": {"stats": floats[12:32].view(4, 5)},
        "stats, grad": {"stats": stats, "grad": floats[32:48].view(4, 4)},
        "active, x": {**masked, "active": floats.view(torch.bool)[:4]},
        "active, stats": {**masked, "active": floats.view(torch.bool)[64:68], "stats": stats},
        "frozen_at, rng": {**masked, "frozen_at": words[2:6], "rng": words[:3]},
        "frozen_at, active": {
            **masked, "frozen_at": words[2:6], "active": words.view(torch.bool)[40:44],
        },
    }  # fmt: skip
    return {"x": x, "grad": grad, "rng": rng, "drift": 0.1, "noise": 0.1, **cases[name]}


SHARED = [
    "x, grad", "x, grad transposed", "x, grad expanded", "x, grad of half precision", "x, x_ref",
    "x, xi", "x, rng", "x, drift", "x, noise", "x, decay", "x, pull", "x_low, x", "x_low, grad",
    "stats, x", "stats, grad", "active, x", "active, stats", "frozen_at, rng", "frozen_at, active",
]  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_shared_memory_is_named(device: torch.device, name: str) -> None:
    """In the op and in the bound step of a chain, by the names of both arguments."""
    given = overlapping(name, device)
    first, second = name.replace(",", "").split()[:2]
    x, grad, rng = (given.pop(key) for key in ("x", "grad", "rng"))
    tensors = [x, grad, *(t for t in given.values() if isinstance(t, Tensor))]
    before = [t.clone() for t in tensors]
    message = f"{first}: must not share memory with {second}|{second}: .* with {first}"
    with pytest.raises(ValueError, match=message):
        cf.ops.langevin_step_(x, grad, rng, **given)
    if second != "grad" and given.keys().isdisjoint({"xi", "stats"}):  # which have rows there
        with pytest.raises(ValueError, match=message):
            cf.ops.BoundStep(**given).in_place(x, rng)(grad, 0)
    assert all(map(torch.equal, tensors, before))


def test_a_gradient_in_the_memory_of_the_state_is_copied(device: torch.device) -> None:
    """In the loop of a chain, whose score may be a view of the state or of what a step writes."""
    for name in (name for name in SHARED if name.endswith(("grad", "transposed", "expanded"))):
        given = overlapping(name, device)
        x, grad, rng = (given.pop(key) for key in ("x", "grad", "rng"))
        if "stats" in given:
            given["stats"] = given["stats"][None]
        apart = {n: v.clone() if isinstance(v, Tensor) else v for n, v in given.items()}
        expected = x.clone()
        cf.ops.BoundStep(**apart).in_place(expected, rng)(grad.clone(), 0)
        cf.ops.BoundStep(**given).in_place(x, rng)(grad, 0)
        assert torch.equal(x, expected), name


def test_rows_that_share_memory_with_the_state_are_named(device: torch.device) -> None:
    floats, rng = torch.ones(80, device=device), KEY.tensor(device)
    x, grad = floats[:16].view(4, 4), torch.ones(4, 4, device=device)
    for name, rows in {
        "xi": floats[8:72].view(4, 4, 4),
        "stats": floats[8:68].view(3, 4, 5),
    }.items():
        step = cf.ops.BoundStep(drift=0.1, noise=0.1, **{name: rows})
        with pytest.raises(ValueError, match=f"(x|{name}): must not share memory with (x|{name})"):
            step.in_place(x, rng)(grad, 1)
    assert (floats == 1).all()


def test_noise_that_shares_memory_is_named(device: torch.device) -> None:
    floats, rng = torch.ones(64, device=device), KEY.tensor(device)
    x = floats[:16].view(4, 4)
    for name, given in {
        "xi": {"noise": 0.1, "xi": floats[1:17].view(4, 4)},
        "noise": {"noise": floats[:1].view(1, 1)},
        "active": {"noise": 0.1, "active": floats.view(torch.bool)[:4]},
    }.items():
        with pytest.raises(ValueError, match=f"x: must not share memory with {name}"):
            cf.ops.langevin_noise_(x, rng, **given)
    for fill in (torch.ops.coopflow.normal_, torch.ops.coopflow.uniform_):
        with pytest.raises(RuntimeError, match="out: must not share memory with rng"):
            fill(rng.view(torch.float32), rng)
    assert (floats == 1).all()
    assert torch.equal(rng, KEY.tensor(device))


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[:1].expand(4, 4), lambda x: x])
def test_a_score_may_be_a_view_of_its_state(device: torch.device, view: Any) -> None:
    """Which would change while it is read."""
    x0 = torch.arange(16.0, device=device).view(4, 4)
    sampler = cf.LangevinSampler(score=view, n_steps=2, drift=0.1, noise=0.0)
    expected = x0
    for _ in range(2):
        expected = expected + 0.1 * view(expected)
    torch.testing.assert_close(sampler(x0).x, expected)


@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "ignore"}, {"grad_norm": 1e9}])
def test_scores_may_be_tensors_of_the_state(device: torch.device, options: dict[str, Any]) -> None:
    """All tensors move by what the state was before the first of them did."""
    state = [torch.full((3, 2), v, device=device) for v in (1.0, 2.0, 5.0)]
    sampler = cf.LangevinSampler(
        score=lambda s: (s[1], s[2], s[0].view(3, 2)), n_steps=2, drift=0.5, noise=0.0, **options
    )
    a, b, c = (x.clone() for x in state)
    for _ in range(2):
        a, b, c = a + 0.5 * b, b + 0.5 * c, c + 0.5 * a
    for found, expected in zip(sampler(state).x, (a, b, c), strict=True):
        torch.testing.assert_close(found, expected)


# --- outputs --------------------------------------------------------------------------------------


def outputs_of_a_step(device: torch.device) -> dict[str, Any]:
    return {
        "x_low": torch.ones(4, 6, dtype=torch.bfloat16, device=device),
        "stats": torch.ones(4, 5, device=device),
        "active": torch.ones(4, dtype=torch.bool, device=device),
        "frozen_at": torch.ones(4, dtype=torch.int64, device=device),
    }


@pytest.mark.parametrize("kind", ["negated", "sparse", "requires grad", "without data"])
@pytest.mark.parametrize("name", ["x_low", "stats", "active", "frozen_at"])
def test_an_output_is_refused_like_the_state(device: torch.device, name: str, kind: str) -> None:
    x, rng, outputs = torch.ones(4, 6, device=device), KEY.tensor(device), outputs_of_a_step(device)
    if kind in ("negated", "requires grad") and name in ("active", "frozen_at"):
        if kind == "requires grad":
            return  # torch has no such tensor
        if name == "active":
            return
    wrong = {
        "negated": lambda t: torch._neg_view(t),
        "sparse": Tensor.to_sparse,
        "requires grad": lambda t: t.requires_grad_(),
        "without data": lambda t: t.to("meta"),
    }[kind]
    before = {n: t.clone() for n, t in outputs.items() if n != name}
    outputs[name] = wrong(outputs[name])
    message = {
        "negated": f"{name} is a lazily negated view",
        "sparse": "must be dense",
        "requires grad": f"{name} requires grad",
        "without data": f"{name}: must be on the device of x",
    }[kind]
    with pytest.raises(ValueError, match=message):
        cf.ops.langevin_step_(x, x.clone(), rng, drift=0.1, freeze_nonfinite=True, **outputs)
    assert (x == 1).all()
    assert all(torch.equal(outputs[n], t) for n, t in before.items())


def test_autograd_sees_that_outputs_were_written(device: torch.device) -> None:
    x, rng, outputs = torch.ones(4, 6, device=device), KEY.tensor(device), outputs_of_a_step(device)
    versions = {name: t._version for name, t in outputs.items()}
    cf.ops.langevin_step_(x, x.clone(), rng, drift=0.1, freeze_nonfinite=True, **outputs)
    assert all(outputs[name]._version > version for name, version in versions.items())


@pytest.mark.parametrize("name", ["drift", "noise", "pull", "x_ref", "xi"])
def test_what_is_read_must_not_want_a_gradient(device: torch.device, name: str) -> None:
    """Which an op in place would lose; under no_grad nobody asks for one."""
    x, rng = torch.ones(4, 6, device=device), KEY.tensor(device)
    given: dict[str, Any] = {
        "drift": torch.full((1, 4), 0.1), "noise": torch.full((1, 1), 0.2),
        "pull": torch.full((1, 1), 0.2), "x_ref": torch.zeros(4, 6), "xi": torch.ones(4, 6),
    }  # fmt: skip
    given = {key: value.to(device) for key, value in given.items()}
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"langevin_step_: {name} requires grad"):
        cf.ops.langevin_step_(x, x, rng, **given)
    if name in ("noise", "xi"):
        noise = {"noise": given["noise"], "xi": given["xi"]}
        with pytest.raises(ValueError, match=f"langevin_noise_: {name} requires grad"):
            cf.ops.langevin_noise_(x, rng, **noise)
    assert (x == 1).all()
    with torch.no_grad():
        cf.ops.langevin_step_(x, x, rng, **given)


def test_an_option_that_no_step_has_is_named() -> None:
    with pytest.raises(TypeError, match="langevin_step_ has no option 'nois'"):
        cf.ops.BoundStep(drift=0.1, nois=0.2).in_place(torch.ones(2, 3), KEY.tensor())
