"""Bad input of the Langevin ops: named, and nothing is changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import coopflow_ext as cf
from coopflow_ext.ops.langevin import bound_arguments

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


def bound_call(numbers: Tensor, device: Any = "cpu", **given: Any) -> tuple[Any, ...]:
    """Arguments of the raw op of a bound step, of which some are given."""
    tensors = {
        "x": torch.ones(4, 6, device=device),
        "grad": torch.ones(4, 6, device=device),
        "rng": KEY.tensor(device),
        "numbers": numbers,
        "step": 0,
        "active": None,
        "frozen_at": None,
        "constants": None,
        "outputs": None,
    }
    return tuple({**tensors, **given}.values())


def numbers_of(**options: Any) -> Tensor:
    return bound_arguments(**{"drift": 0.1, **options})[0]


XI, STATS = torch.ones(2, 4, 6), torch.ones(2, 4, 5)


@pytest.mark.parametrize(
    ("numbers", "given", "message"),
    [
        (torch.zeros(13), {}, "numbers: must have dtype float64"),
        (torch.zeros(8).double(), {}, r"numbers: must have shape \(13,\), got \(8,\)"),
        (torch.zeros(26).double()[::2], {}, "numbers: must be contiguous"),
        (torch.full((13,), math.nan).double(), {}, "noise_when: must be in"),
        (numbers_of(drift=math.nan), {}, "drift: must be finite"),
        (numbers_of(noise=-1.0), {}, "noise: must not be negative"),
        (numbers_of(grad_clip=0.0), {}, "grad_clip: must be"),
        (numbers_of(clamp=(1.0, -1.0)), {}, "clamp: must be"),
        (numbers_of(noise_when=3), {}, r"noise_when: must be in \[0, 3\), got 3"),
        (numbers_of(pull=0.1), {}, "pull: needs x_ref"),
        (numbers_of(freeze_nonfinite=True), {}, "freeze_nonfinite: needs active"),
        (numbers_of(xi=XI), {}, "constants: must be 1 tensors by numbers, got 0"),
        (numbers_of(), {"constants": [XI]}, "constants: must be 0 tensors by numbers, got 1"),
        (numbers_of(stats=STATS), {}, "outputs: must be 1 tensors by numbers, got 0"),
        (numbers_of(xi=XI), {"constants": [XI[0]]}, "xi: must have a row of the shape of x"),
        (numbers_of(xi=XI), {"constants": [XI[:, :3]]}, "xi: must have a row of the shape of x"),
        (numbers_of(xi=XI), {"constants": [XI.double()]}, "xi: must have dtype float32"),
        (numbers_of(xi=XI), {"constants": [XI.mT.contiguous().mT]}, "xi: must have the strides"),
        (numbers_of(xi=XI), {"constants": [XI], "step": 2}, "xi: row 2 was asked of a tensor with"),
        (numbers_of(xi=XI, noise_when=1), {"constants": [XI], "step": 1}, "xi: row 2 was asked"),
        (numbers_of(stats=STATS), {"outputs": [STATS[0]]}, r"stats: must have shape \(T, 4, 5\)"),
        (numbers_of(stats=STATS), {"outputs": [STATS], "step": 2}, "stats: row 2 was asked"),
        (numbers_of(), {"step": -1}, "step: must be in"),
    ],
)
def test_bad_arguments_of_the_bound_step(
    device: torch.device, numbers: Tensor, given: dict[str, Any], message: str
) -> None:
    given = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, given)
    arguments = bound_call(numbers, device, **given)
    before = arguments[0].clone()
    with pytest.raises(RuntimeError, match=f"coopflow::langevin_bound_step_: {message}"):
        torch.ops.coopflow.langevin_bound_step_(*arguments)
    assert torch.equal(arguments[0], before)


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


def test_the_numbers_of_a_bound_step_stay_on_the_cpu(device: torch.device) -> None:
    """Beside tensors of another device, here without data, and as the only ones without data."""
    step, numbers = torch.ops.coopflow.langevin_bound_step_, numbers_of()
    step(*bound_call(numbers, "meta"))
    arguments = bound_call(numbers.to("meta"), device)
    before = arguments[0].clone()
    with pytest.raises(ValueError, match="numbers: must be on the CPU, got meta"):
        step(*arguments)
    assert torch.equal(arguments[0], before)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOREIGN)
def test_mixed_devices_are_named(name: str) -> None:
    assert_a_foreign_tensor_is_named(name, "cuda", "cpu")
