"""Whole Langevin chains of a fully connected energy, in one kernel."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import pytest
import torch
from instruction_sets import fingerprints
from torch import Tensor
from torch.library import opcheck

import coopflow_ext as cf
from coopflow_ext import reference
from coopflow_ext.ops._langevin_chain import ChainResult
from coopflow_ext.ops.mlp import ACTIVATIONS

KEY = cf.Key(0xDEADBEEF12345678, time=3, chain=11)
ARGUMENTS: dict[str, dict[str, float]] = {
    "leaky_relu": {"negative_slope": 0.2},
    "elu": {"alpha": 0.7},
    "softplus": {"beta": 2.0, "threshold": 3.0},
}
DTYPES = (torch.float32, torch.float64)
Arguments = dict[str, Any]


def arguments(
    batch: int = 37,
    d: int = 3,
    widths: tuple[int, ...] = (20, 16),
    activation: str = "silu",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Arguments:
    """A call of the op, with weights that keep the numbers of a layer about as large as those
    before it."""
    generator = torch.Generator().manual_seed(batch + d)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = [d, *widths, 1]
    weights = [draw(n_out, n_in) / n_in**0.5 for n_in, n_out in itertools.pairwise(sizes)]
    biases = [0.3 * draw(n_out) for n_out in sizes[1:]]
    plain = {
        "x0": draw(batch, d), "weights": weights, "biases": biases, "rng": KEY.tensor(),
        "activation": activation, "activation_args": ARGUMENTS.get(activation),
        "n_steps": 3, "drift": 0.3, "noise": 0.1,
    }  # fmt: skip
    return cast({**plain, **options}, dtype, device)


def cast(value: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Floating-point tensors in this dtype, everything on this device."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, list):
        return [cast(item, dtype, device) for item in value]
    if isinstance(value, dict):
        return {name: cast(item, dtype, device) for name, item in value.items()}
    return value


def run(given: Arguments) -> ChainResult:
    return cf.ops.mlp_langevin_chain(**given)


def assert_like_the_reference(given: Arguments) -> None:
    """x, trajectory and frozen_at against the reference in float64."""
    ours = run(given)
    stats = given.get("stats", False)
    wide = {name: v for name, v in given.items() if name != "stats"}
    exact = reference.mlp_langevin_chain(**cast(wide, torch.float64, "cpu"))
    assert (ours.stats is not None) == stats
    # Of normals near zero: approximate logarithms near 1 on a GPU.
    bound = 2e-3 if ours.x.is_cuda else {torch.float32: 5e-6, torch.float64: 2e-14}[ours.x.dtype]
    for mine, expected in zip((ours.x, ours.trajectory, ours.frozen_at), exact, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None and expected is not None:
            assert mine.shape == expected.shape
            torch.testing.assert_close(
                mine.cpu().to(expected.dtype), expected, rtol=bound, atol=bound
            )


def only_where_it_runs(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 runs on the CPU alone")


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(device: torch.device, activation: str, dtype: torch.dtype) -> None:
    only_where_it_runs(dtype, device)
    assert_like_the_reference(arguments(activation=activation, dtype=dtype, device=device))


@pytest.mark.parametrize("activation", ARGUMENTS)
def test_parameters_of_activations_are_torchs_unless_given(
    device: torch.device, activation: str
) -> None:
    given = arguments(activation=activation, device=device)
    own = run(given).x
    given["activation_args"] = None
    assert_like_the_reference(given)
    assert not torch.equal(run(given).x, own)


@pytest.mark.parametrize("one", [{"threshold": 3.0}, {"beta": 2.0}])
def test_a_parameter_alone_leaves_the_other_as_it_is(
    device: torch.device, one: dict[str, float]
) -> None:
    """And their order does not matter."""
    both = {"beta": 1.0, "threshold": 20.0} | one
    given = arguments(activation="softplus", device=device)
    x, alone, reversed_ = (
        run(given | {"activation_args": args}).x
        for args in (both, one, dict(reversed(both.items())))
    )
    assert torch.equal(alone, x)
    assert torch.equal(reversed_, x)


@pytest.mark.parametrize(
    ("d", "widths"),
    [
        (1, (1,)), (2, (64, 64, 64)), (3, (16, 20)), (7, (127, 128, 20, 1)), (64, (128,)),
        (2, (1, 127)), (128, (64, 16)), (5, (20, 20, 20, 20)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape(
    device: torch.device, d: int, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    only_where_it_runs(dtype, device)
    assert_like_the_reference(arguments(21, d, widths, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_network(dtype: torch.dtype) -> None:
    """On the CPU: its weights do not fit in a multiprocessor."""
    assert_like_the_reference(arguments(18, 128, (128,) * 4, dtype=dtype))


@pytest.mark.parametrize("batch", [0, 1, 15, 16, 17, 4097])
def test_every_batch(device: torch.device, batch: int) -> None:
    assert_like_the_reference(arguments(batch, thin=2, freeze_nonfinite=True, device=device))


def tables(batch: int) -> Arguments:
    return {
        "drift": torch.linspace(0.1, 0.5, 5 * batch).view(5, batch).double(),
        "noise": torch.linspace(0.1, 0.2, 5).view(5, 1),
        "decay": torch.linspace(0.0, 0.1, batch).view(1, batch),
        "step": 2,
    }


OPTIONS: dict[str, Arguments] = {
    "nothing": {"noise": 0.0, "n_steps": 0},
    "no noise": {"noise": 0.0},
    "a trajectory": {"thin": 1},
    "a thin trajectory": {"thin": 2, "n_steps": 5},
    "a trajectory of no state": {"thin": 4},
    "an energy of other sign": {"negative_energy": True},
    "clips": {"grad_clip": 0.3, "step_clip": 0.05},
    "a norm": {"grad_norm": 0.5, "grad_clip": 0.4},
    "a clamp": {"clamp": (-0.5, 0.7)},
    "a clamp at the end": {"clamp": (-0.5, 0.7), "clamp_end": True},
    "a pull": {"pull": 0.2, "x_ref": torch.full((37, 3), 0.4), "decay": 0.1},
    "given noise": {"xi": torch.linspace(-2, 2, 3 * 37 * 3).view(3, 37, 3)},
    "tables": tables(37),
    "everything": {
        **tables(37), "pull": 0.2, "x_ref": torch.full((37, 3), 0.4), "grad_clip": 0.5,
        "grad_norm": 0.7, "step_clip": 0.2, "clamp": (-1.0, 1.0), "thin": 1, "stats": True,
        "freeze_nonfinite": True, "negative_energy": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(device: torch.device, name: str, dtype: torch.dtype) -> None:
    only_where_it_runs(dtype, device)
    options = dict(OPTIONS[name])
    given = arguments(dtype=dtype, device=device, **options)
    for coefficient in ("drift", "noise", "decay"):  # tables have a dtype of their own
        if isinstance(options.get(coefficient), Tensor):
            given[coefficient] = options[coefficient].to(device)
    assert_like_the_reference(given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_steps(device: torch.device, dtype: torch.dtype) -> None:
    only_where_it_runs(dtype, device)
    options = {"grad_clip": 0.4, "step_clip": 0.1, "clamp": (-0.8, 0.8)}
    given = arguments(dtype=dtype, device=device, stats=True, **options)
    x = given["x0"].clone()
    network = {n: given[n] for n in ("weights", "biases", "activation", "activation_args")}
    expected = torch.empty(given["n_steps"], len(x), 6, dtype=dtype, device=device)
    for k in range(given["n_steps"]):
        leaf = x.clone().requires_grad_()
        energy = reference.mlp_energy(leaf, **network)
        (grad,) = torch.autograd.grad(energy.sum(), leaf)
        stats = expected.new_empty(len(x), 5)
        cf.ops.langevin_step_(
            x, grad, given["rng"], drift=0.3, noise=0.1, step=k, stats=stats, **options
        )
        expected[k] = torch.cat((stats, energy.detach()[:, None]), dim=1)
    ours = run(given).stats
    assert ours is not None
    bound = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, expected, rtol=bound, atol=bound)
    assert 0 < ours[..., 2].sum() < ours[..., 2].numel() * 3
    assert 0 < ours[..., 3].sum() < ours[..., 3].numel() * 3


def test_the_start_stays_as_it_is(device: torch.device) -> None:
    given = arguments(device=device)
    before = given["x0"].clone()
    x = run(given).x
    assert torch.equal(given["x0"], before)
    assert x.data_ptr() != given["x0"].data_ptr()


def test_weights_are_read_at_every_call(device: torch.device) -> None:
    given = arguments(device=device)
    before = run(given).x
    given["weights"][1].mul_(2)
    assert not torch.equal(run(given).x, before)
    assert_like_the_reference(given)


# --- what a chain does not depend on --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 64])
def test_a_chain_does_not_know_its_batch(device: torch.device, d: int, dtype: torch.dtype) -> None:
    """Chain 17 of 64 is chain 0 at its number, to the bit, in all results."""
    only_where_it_runs(dtype, device)
    options = {"grad_norm": 0.5, "thin": 1, "stats": True, "freeze_nonfinite": True}
    given = arguments(64, d, dtype=dtype, device=device, **options)
    whole = run(given)
    alone = run(
        {
            **given,
            "x0": given["x0"][17:18].clone(),
            "rng": KEY.at_chain(KEY.chain + 17).tensor(device),
        }
    )
    assert torch.equal(whole.x[17:18], alone.x)
    assert torch.equal(whole.frozen_at[17:18], alone.frozen_at)
    for mine, other in ((whole.trajectory, alone.trajectory), (whole.stats, alone.stats)):
        assert mine is not None
        assert other is not None
        assert torch.equal(mine[:, 17:18], other)


def fingerprint() -> str:
    """Of the results of every activation in both dtypes."""
    digest = hashlib.sha256()
    for activation, dtype in itertools.product(ACTIVATIONS, DTYPES):
        for result in run(arguments(67, 5, (20, 9), activation, dtype, thin=1, stats=True)):
            assert result is not None
            digest.update(result.numpy().tobytes())
    return digest.hexdigest()


_FINGERPRINT = "import sys, torch, test_mlp; torch.set_num_threads(int(sys.argv[1])); " \
    "print(test_mlp.fingerprint())"  # fmt: skip


def test_instruction_sets_and_thread_counts_give_the_same_bits() -> None:
    prints = fingerprints(_FINGERPRINT, two_threads=True)
    assert len(set(prints.values())) == 1, prints


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_nan_weights_stop_every_chain_at_once(device: torch.device, layer: int) -> None:
    given = arguments(device=device, freeze_nonfinite=True, thin=1, step=4)
    given["weights"][layer].view(-1)[0] = math.nan
    result = run(given)
    assert torch.equal(result.x, given["x0"])
    assert result.frozen_at.tolist() == [4] * 37
    assert result.trajectory is not None
    assert torch.equal(result.trajectory, given["x0"].expand(3, -1, -1))


def test_a_chain_stops_alone(device: torch.device) -> None:
    given = arguments(device=device, freeze_nonfinite=True, stats=True)
    healthy = run(given)
    given["x0"][5, 1] = math.inf
    result = run(given)
    others = torch.arange(37, device=device) != 5
    assert torch.equal(result.x[others], healthy.x[others])
    assert torch.equal(result.x[5], given["x0"][5])
    assert result.frozen_at.tolist() == [0 if i == 5 else 3 for i in range(37)]
    assert result.stats is not None
    assert (result.stats[:, 5, 4] > 0).all()
    assert (result.stats[:, 5, 1:4] == 0).all()


def test_without_freezing_a_chain_goes_on(device: torch.device) -> None:
    given = arguments(device=device)
    given["weights"][1][0, 0] = math.nan
    result = run(given)
    assert result.x.isnan().all()
    assert result.frozen_at.tolist() == [3] * 37


# --- bad input ------------------------------------------------------------------------------------

_GIVEN = arguments()
_WEIGHTS, _BIASES = _GIVEN["weights"], _GIVEN["biases"]


def _changed(parameters: list[Tensor], i: int, value: Any) -> list[Any]:
    return [value if j == i else p for j, p in enumerate(parameters)]


BAD: dict[str, tuple[Arguments, type[Exception], str]] = {
    "x0 of three dimensions": ({"x0": torch.zeros(4, 3, 1)}, ValueError, r"x0: .*\(B, D\)"),
    "x0 in half precision": ({"x0": torch.zeros(4, 3).half()}, TypeError, "x0: .*float16"),
    "x0 strided": ({"x0": torch.zeros(3, 4).t()}, ValueError, "x0: must be"),
    "x0 too long": ({"x0": torch.zeros(4, 129)}, ValueError, "x0: must have at most 128.*129"),
    "no hidden layer": (
        {"weights": _WEIGHTS[2:], "biases": _BIASES[2:]}, ValueError,
        "weights: must be 2 to 5 matrices.*got 1",
    ),
    "five hidden layers": (
        {"weights": [*_WEIGHTS, *_WEIGHTS], "biases": [*_BIASES, *_BIASES]}, ValueError, "got 6",
    ),
    "a bias less": ({"biases": _BIASES[:2]}, ValueError, "biases: must be as many .* 3, got 2"),
    "layers that do not fit": (
        {"weights": _changed(_WEIGHTS, 1, torch.zeros(16, 21))}, ValueError,
        r"weights\[1\]: must have shape \(out, 20\), got \(16, 21\)",
    ),
    "two outputs": (
        {"weights": _changed(_WEIGHTS, 2, torch.zeros(2, 16))}, ValueError,
        r"weights\[2\]: must have shape \(1, 16\), got \(2, 16\)",
    ),
    "a layer too wide": (
        {"weights": _changed(_WEIGHTS, 0, torch.zeros(129, 3))}, ValueError,
        r"weights\[0\]: must have at most 128",
    ),
    "weights of another dtype": (
        {"weights": _changed(_WEIGHTS, 1, _WEIGHTS[1].double())}, TypeError,
        r"weights\[1\]: must have dtype float32, got dtype float64",
    ),
    "weights transposed": (
        {"weights": _changed(_WEIGHTS, 1, torch.zeros(20, 16).t())}, ValueError,
        r"weights\[1\]: must be contiguous",
    ),
    "a bias too long": (
        {"biases": _changed(_BIASES, 1, torch.zeros(17))}, ValueError,
        r"biases\[1\]: must have shape \(16,\), got \(17,\)",
    ),
    "a bias that is None": ({"biases": _changed(_BIASES, 1, None)}, TypeError, "biases"),
    "a weight that is a list": ({"weights": _changed(_WEIGHTS, 1, [1.0])}, TypeError, "weights"),
    "another activation": ({"activation": "mish"}, ValueError, "activation must be one of.*'mish'"),
    "another parameter": (
        {"activation_args": {"alpha": 1.0}}, ValueError,
        "activation_args of silu are none, .*'alpha'",
    ),
    "a parameter that is no number": (
        {"activation": "elu", "activation_args": {"alpha": "1"}}, TypeError,
        "alpha must be a number",
    ),
    "a parameter that is not finite": (
        {"activation": "elu", "activation_args": {"alpha": math.nan}}, ValueError,
        "activation_args: must be finite",
    ),
    "a beta of zero": (
        {"activation": "softplus", "activation_args": {"beta": 0.0}}, ValueError,
        "beta must not be 0",
    ),
    "steps below zero": ({"n_steps": -1}, ValueError, "n_steps: must not be negative, got -1"),
    "thin zero": ({"thin": 0}, ValueError, "thin must be ≥ 1"),
    "a table too short": ({"drift": torch.ones(2, 1)}, ValueError, "row 2 was asked .* 2 rows"),
    "normals of another shape": ({"xi": torch.zeros(2, 37, 3)}, ValueError, r"xi: must have shape"),
    "a pull to nothing": ({"pull": 0.1}, ValueError, "pull: needs x_ref"),
    "a start that requires grad": (
        {"x0": torch.zeros(4, 3, requires_grad=True)}, ValueError, "x0 requires grad"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    given, error, message = BAD[name]
    with pytest.raises(error, match=message):
        run({**_GIVEN, **given})


def test_weights_on_another_device_are_named() -> None:
    given = arguments()
    given["weights"][1] = given["weights"][1].to("meta")
    with pytest.raises(
        ValueError, match=r"weights\[1\]: must be on the device of x0, cpu, got meta"
    ):
        run(given)


# --- what fits on a GPU ---------------------------------------------------------------------------

SM_80, SM_90 = 163 * 1024, 227 * 1024


def tile_bytes(sizes: tuple[int, ...], chains: int = 8) -> int:
    """Matrices with rows of an odd number of 16-byte words; biases; slopes; the last layer; values
    of two layers; x, gradient, reference and noise, of an odd length."""

    def padded(n: int) -> int:
        return -(-n // 4) * 4

    floats = padded(sizes[-1]) + 4 + 2 * padded(max(sizes[1:])) * chains
    for n_in, n_out in itertools.pairwise(sizes):
        stride = padded(n_in) + (4 if padded(n_in) % 8 == 0 else 0)
        floats += n_out * stride + padded(n_out) + n_out * chains
    return 4 * (floats + 4 * chains * (padded(sizes[0]) + 1))


@pytest.mark.parametrize(
    ("sizes", "fits_on"),
    [
        ((2, 64, 64, 64), (SM_80, SM_90)), ((128, 64, 64, 64, 64), (SM_80, SM_90)),
        ((3, 16, 20), (SM_80, SM_90)), ((2, 128, 128), (SM_80, SM_90)),
        ((2, 128, 128, 128), (SM_80, SM_90)), ((64, 128, 128, 128), (SM_90,)),
        ((2, 128, 128, 128, 128), ()), ((128, 128, 128, 128, 128), ()),
    ],
)  # fmt: skip
def test_what_fits_in_a_multiprocessor(sizes: tuple[int, ...], fits_on: tuple[int, ...]) -> None:
    needed = cf.ops.mlp_shared_bytes(sizes)
    assert needed == tile_bytes(sizes)
    assert tuple(limit for limit in (SM_80, SM_90) if needed <= limit) == fits_on


@pytest.mark.parametrize("sizes", [(3,), (3, 4, 5, 6, 7, 8), (0, 3), (3, 129)])
def test_sizes_of_no_network_are_named(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sizes: must be"):
        cf.ops.mlp_shared_bytes(sizes)


@pytest.mark.gpu
def test_a_network_that_does_not_fit_is_named() -> None:
    given = arguments(5, 128, (128,) * 4, device="cuda")
    needed = cf.ops.mlp_shared_bytes((128,) * 5)
    with pytest.raises(ValueError, match=f"weights: a tile of 8 chains needs {needed} bytes"):
        run(given)


# --- torch's own machinery ------------------------------------------------------------------------


def test_parameters_are_constants(device: torch.device) -> None:
    given = arguments(device=device, thin=1, stats=True)
    for parameter in (*given["weights"], *given["biases"]):
        parameter.requires_grad_()
    assert not any(result is not None and result.requires_grad for result in run(given))


def test_opcheck(device: torch.device) -> None:
    given = arguments(5, device=device)
    raw = (given["x0"], given["rng"], given["weights"], given["biases"], 0, 0.0, 0.0)
    op = torch.ops.coopflow.mlp_langevin_chain.default
    opcheck(op, raw, {"n_steps": 3, "drift": 0.1, "noise": 0.2})
    opcheck(op, raw, {"n_steps": 4, "drift": 0.1, "thin": 2, "stats": True})


def test_one_graph_under_compile(device: torch.device) -> None:
    given = arguments(5, device=device, thin=1, stats=True)
    compiled = torch.compile(cf.ops.mlp_langevin_chain, fullgraph=True)
    for ours, plain in zip(compiled(**given), run(given), strict=True):
        assert torch.equal(ours, plain)
