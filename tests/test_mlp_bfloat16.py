"""Chains of a fully connected energy with products in bfloat16: what tensor cores are for.

On a GPU, and on the CPU by an emulated device; a CPU itself computes them in float32.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_emulation import harness
from torch import Tensor
from torch.utils._pytree import tree_map_only

import coopflow_ext as cf
from coopflow_ext import reference
from coopflow_ext.ops._langevin_chain import ChainResult
from coopflow_ext.ops.mlp import ACTIVATIONS

pytestmark = pytest.mark.timeout(1200)  # the first test compiles

KEY = cf.Key(0xDEADBEEF12345678, time=3, chain=11)
# Relative error of the gradient against float64, by the number of hidden layers.
BOUND = {2: 5e-3, 3: 1e-2, 4: 1.5e-2}
# Where rounding puts a unit on the other side of its kink, its chain's gradient jumps. What is
# within the bounds above is the median chain.
KINKED, KINKED_BOUND = ("relu", "leaky_relu"), 0.5
DEVICES = ["emulation", pytest.param("cuda", marks=pytest.mark.gpu)]
Arguments = dict[str, Any]
Run = Callable[[Arguments], ChainResult]


@pytest.fixture(params=DEVICES)
def place(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def run(place: str) -> Run:
    """Calls the op on the device; takes and gives tensors on the CPU."""
    return on_cuda if place == "cuda" else emulated


def emulated(given: Arguments, device: int = harness.ONE_BLOCK) -> ChainResult:
    emulation = harness.load()
    with emulation.settings(device=device), emulation.ops():
        return cf.ops.mlp_langevin_chain(**given)


def on_cuda(given: Arguments) -> ChainResult:
    result = cf.ops.mlp_langevin_chain(**tree_map_only(Tensor, lambda t: t.cuda(), given))
    moved: ChainResult = tree_map_only(Tensor, lambda t: t.cpu(), result)
    return moved


def network(d: int, widths: tuple[int, ...], *, by_torch: bool = False) -> Arguments:
    """Weights that keep a layer's numbers about as large as those before it, or that torch gives
    a Linear."""
    torch.manual_seed(len(widths) + widths[0])
    layers = [torch.nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise((d, *widths, 1))]
    if not by_torch:
        for layer in layers:
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            torch.nn.init.normal_(layer.bias, std=0.3)
    return {
        "weights": [layer.weight.detach() for layer in layers],
        "biases": [layer.bias.detach() for layer in layers],
        "activation": "silu",
    }


def start(batch: int, d: int) -> Tensor:
    return torch.randn(batch, d, generator=torch.Generator().manual_seed(1))


def chain(batch: int, d: int, widths: tuple[int, ...], **options: Any) -> Arguments:
    plain = {"x0": start(batch, d), "rng": KEY.tensor(), "n_steps": 3, "drift": 0.3, "noise": 0.1}
    return {**network(d, widths), **plain, "bfloat16": True, **options}


def gradient(run: Run, net: Arguments, x: Tensor) -> Tensor:
    """Of one step without noise, which is so long that x itself does not hide it."""
    step = {"rng": KEY.tensor(), "n_steps": 1, "drift": 1024.0, "bfloat16": True}
    return (x - run({"x0": x, **net, **step}).x).double() / 1024


def reference_gradient(net: Arguments, x: Tensor, *, bfloat16: bool) -> Tensor:
    """In float64; with the factors of products rounded to bfloat16, or as it is."""
    wide = tree_map_only(Tensor, Tensor.double, net)
    leaf = x.double().requires_grad_()
    energy = reference.mlp_energy(leaf, **wide, bfloat16=bfloat16)
    (grad,) = torch.autograd.grad(energy.sum(), leaf)
    return grad


def relative(error: Tensor, exact: Tensor, dim: int | None = None) -> Tensor:
    norm = functools.partial(torch.linalg.vector_norm, dim=dim)
    ratio: Tensor = norm(error - exact) / norm(exact)
    return ratio


# --- the gradient ---------------------------------------------------------------------------------

WIDTHS = [16, 20, 64, *(pytest.param(n, marks=pytest.mark.slow) for n in (127, 128))]


@pytest.mark.parametrize("by_torch", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_of_the_gradient(
    run: Run, place: str, activation: str, width: int, by_torch: bool
) -> None:
    """It is the rounding of factors, and nothing else, and as large as documented."""
    x = start(32, 3)
    for depth in (1, 2, 3, 4):
        net = {**network(3, (width,) * depth, by_torch=by_torch), "activation": activation}
        ours = gradient(run, net, x)
        exact = reference_gradient(net, x, bfloat16=False)
        rounded = reference_gradient(net, x, bfloat16=True)
        error = relative(ours, exact).item()
        median = relative(ours, exact, dim=1).median().item()
        print(f"{activation}, {depth} layers of {width}: {error:.1e}, median chain {median:.1e}")
        if depth == 1:  # no product between hidden layers
            assert error < 1e-6
            continue
        assert median < BOUND[depth]
        assert 1e-4 < error < (KINKED_BOUND if activation in KINKED else BOUND[depth])
        # Most chains: in some a sum lies so near the middle of two numbers that another order of
        # its terms rounds it to the other one.
        assert relative(ours, rounded, dim=1).median() < (1e-3 if place == "cuda" else 2e-6)


@pytest.mark.parametrize(
    ("d", "widths"),
    [
        (1, (3, 5)), (2, (1, 127)), (7, (127, 128, 20, 1)), (128, (64, 16)), (33, (16, 33, 7)),
        (128, (128,) * 4),
    ],
)  # fmt: skip
def test_every_shape(run: Run, place: str, d: int, widths: tuple[int, ...]) -> None:
    """The largest one does not fit in a multiprocessor in float32."""
    net, x = network(d, widths), start(11, d)
    error = relative(gradient(run, net, x), reference_gradient(net, x, bfloat16=True), dim=1)
    assert error.median() < (1e-3 if place == "cuda" else 2e-6)


def test_a_step_is_that_of_float32_but_for_the_error(run: Run) -> None:
    given = chain(37, 3, (64, 64, 64), n_steps=1)
    ours, plain = run(given).x, cf.ops.mlp_langevin_chain(**given).x
    moved = 0.3 * reference_gradient(network(3, (64, 64, 64)), given["x0"], bfloat16=False).norm()
    assert 0 < (ours - plain).norm() < BOUND[3] * moved


# --- chains ---------------------------------------------------------------------------------------

EVERYTHING: Arguments = {
    "decay": 0.1, "grad_norm": 0.5, "thin": 1, "stats": True, "freeze_nonfinite": True,
}  # fmt: skip


def assert_equal(ours: ChainResult, other: ChainResult, at: slice = slice(None)) -> None:
    assert torch.equal(ours.x[at], other.x)
    assert torch.equal(ours.frozen_at[at], other.frozen_at)
    for mine, theirs in ((ours.trajectory, other.trajectory), (ours.stats, other.stats)):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine[:, at], theirs)


@pytest.mark.parametrize("sizes", [(3, (20, 16)), (5, (64, 33, 7))])
def test_a_chain_does_not_know_its_batch(run: Run, sizes: tuple[int, tuple[int, ...]]) -> None:
    """Nor the tile that it is in, to the bit, in all results."""
    given = chain(64, *sizes, **EVERYTHING)
    whole = run(given)
    for batch in (1, 16, 47):
        part = {"x0": given["x0"][17 : 17 + batch], "rng": KEY.at_chain(KEY.chain + 17).tensor()}
        assert_equal(whole, run({**given, **part}), slice(17, 17 + batch))


def test_tiles_of_an_emulation_give_the_same_bits() -> None:
    """Of 8, 16 and 32 chains, by the number of multiprocessors."""
    given = chain(64, 3, (20, 16), **EVERYTHING)
    emulation = harness.load()
    emulation.take_launches()
    results = [emulated(given)]
    for device in (harness.FEW_BLOCKS, harness.ALL_BLOCKS):
        results.append(emulated({**given, "x0": given["x0"][:32]}, device))
    launches = emulation.take_launches()
    assert launches == [
        ("mlp_bfloat16_chain_kernel<true, 2>", 1),  # of 32
        ("mlp_bfloat16_chain_kernel<true, 2>", 2),  # of 16
        ("mlp_bfloat16_chain_kernel<true, 1>", 4),  # of 8
    ]
    for result in results[1:]:
        assert_equal(results[0], result, slice(32))


def test_moments_are_those_of_chains_in_float32(run: Run) -> None:
    """Of numbers and their products, within their standard error."""
    given = chain(256, 2, (20, 16), n_steps=40, drift=0.1, noise=math.sqrt(0.2), decay=0.1)
    given["x0"] *= 3
    moments = []
    for x in (run(given).x, cf.ops.mlp_langevin_chain(**given).x):
        terms = torch.cat((x, x.square(), x.prod(1, keepdim=True)), dim=1)
        moments.append((terms.mean(0), terms.std(0) / math.sqrt(len(x))))
    (ours, error), (plain, _) = moments
    assert not torch.equal(ours, plain)
    assert ((ours - plain).abs() < 3 * error).all()


def test_a_chain_stops_alone(run: Run) -> None:
    given = chain(20, 3, (20, 16), freeze_nonfinite=True)
    healthy = run(given).x
    given["x0"][5, 1] = math.inf
    result = run(given)
    others = torch.arange(20) != 5
    assert torch.equal(result.x[others], healthy[others])
    assert torch.equal(result.x[5], given["x0"][5])
    assert result.frozen_at.tolist() == [0 if i == 5 else 3 for i in range(20)]


def test_one_hidden_layer_is_float32_to_the_bit(run: Run) -> None:
    given = chain(20, 3, (20,))
    assert torch.equal(run(given).x, run({**given, "bfloat16": False}).x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_changes_on_a_cpu(dtype: torch.dtype) -> None:
    given = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t,
                          chain(20, 3, (20, 16)))  # fmt: skip
    plain = cf.ops.mlp_langevin_chain(**{**given, "bfloat16": False})
    assert torch.equal(cf.ops.mlp_langevin_chain(**given).x, plain.x)


# --- what fits on a GPU ---------------------------------------------------------------------------

SM_80, SM_90 = 163 * 1024, 227 * 1024


def tile_bytes(sizes: tuple[int, ...], chains: int = 8) -> int:
    """The first matrix, with rows of an odd number of 16-byte words; the others, in 2 bytes and
    padded to multiples of 16, with 8 more a row; biases; a layer's slopes, and the last one's
    values; the last layer; factors of two products; x, gradient, reference and noise, of an odd
    length."""

    def padded(n: int, to: int) -> int:
        return -(-n // to) * to

    d, first = sizes[:2]
    stride = padded(d, 4) + (4 if padded(d, 4) % 8 == 0 else 0)
    floats = first * stride + padded(sizes[-1], 4) + 4
    for n_in, n_out in itertools.pairwise(sizes[1:]):
        floats += padded(n_out, 16) * (padded(n_in, 16) + 8) // 2
    for n in sizes[1:]:
        floats += padded(n, 4) + padded(n, 16) * chains
    floats += chains * (padded(max(sizes[1:]), 16) + 8)
    return 4 * (floats + 4 * chains * (padded(d, 4) + 1))


@pytest.mark.parametrize(
    ("sizes", "fits_on"),
    [
        ((2, 64, 64, 64), (SM_80, SM_90)), ((3, 16, 20), (SM_80, SM_90)),
        ((2, 127, 33, 20), (SM_80, SM_90)), ((64, 128, 128, 128), (SM_80, SM_90)),
        ((2, 128, 128, 128, 128), (SM_80, SM_90)), ((128, 128, 128, 128, 128), (SM_90,)),
    ],
)  # fmt: skip
def test_what_fits_in_a_multiprocessor(sizes: tuple[int, ...], fits_on: tuple[int, ...]) -> None:
    needed = cf.ops.mlp_shared_bytes(sizes, bfloat16=True)
    assert needed == tile_bytes(sizes)
    assert tuple(limit for limit in (SM_80, SM_90) if needed <= limit) == fits_on


def test_one_hidden_layer_needs_as_many_bytes_as_in_float32() -> None:
    assert cf.ops.mlp_shared_bytes((5, 64), bfloat16=True) == cf.ops.mlp_shared_bytes((5, 64))
