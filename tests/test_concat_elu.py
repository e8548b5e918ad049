"""Concat-ELU with dropout of channels by key: its accuracy, mask, layouts and memory, what is not
finite, and bad input. The laws of every op are in test_ops.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from instruction_sets import fingerprints
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from coopflow_ext import Key, flows, ops, reference

KEY = Key(0xDEADBEEF12345678, time=3, chain=11)
LAST = torch.channels_last
# One channel and one position; blocks of words that end within a half and such that do not; more
# channels and more positions than a thread of a CPU has at a time.
SHAPES = (
    (3, 1, 1), (2, 3, 1), (3, 1, 5), (2, 4, 6, 6), (2, 6, 3, 5), (1, 253, 2), (2, 600),
    (1, 96, 16, 32), (1, 3, 2, 5, 7), (1, 2, 9000),
)  # fmt: skip


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )


def channels_innermost(x: Tensor) -> Tensor:
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def gradient(y: Tensor, x: Tensor) -> Tensor:
    """Of a sum in which every element counts, differently."""
    weights = torch.arange(y.numel(), dtype=torch.float64).mul(1.7).sin().view(y.shape)
    return torch.autograd.grad(y, x, weights.to(y))[0]


def as_the_flows_did(x: Tensor, rng: Tensor, p: float, step: int = 0) -> Tensor:
    """Before there was an op."""
    y = functional.elu(torch.cat((x, -x), dim=1), inplace=True)
    dropout = flows.Dropout(p, per_channel=True)
    dropout.index = step
    return dropout(y, flows.Context(dropout_rng=rng))


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.float32, 2.0), (torch.float64, 2.0)])
def test_elu_is_accurate_near_zero_and_far_from_it(
    device: torch.device, dtype: torch.dtype, ulp: float
) -> None:
    """In units of the last place of the result, wherever that is."""
    g = torch.Generator().manual_seed(0)
    exponents = torch.rand(100_000, generator=g, dtype=torch.float64) * 32 - 30
    x = exponents.exp().to(dtype)
    plus, minus = ops.concat_elu(x.to(device)[None, None])[0].cpu().numpy()
    exact = np.expm1(-x.double().numpy().astype(np.longdouble))
    np.testing.assert_array_equal(plus, x.numpy())
    error = np.abs(minus.astype(np.longdouble) - exact)
    assert np.all(error <= ulp * np.spacing(np.abs(exact).astype(minus.dtype)))
    flipped = ops.concat_elu(-x.to(device)[None, None])[0].cpu().numpy()
    np.testing.assert_array_equal(flipped, np.stack((minus, plus)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(device: torch.device, dtype: torch.dtype) -> None:
    """Every finite number of the type, but where float32 is within its error of a tie."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    y = ops.concat_elu(x.to(device)[None, None])[0, 0].cpu()
    exact = torch.where(x > 0, x.double(), torch.expm1(x.double()))
    off = y != exact.to(dtype)
    assert off.sum() <= 4
    error = (y.double() - exact).abs()[off]
    assert (error <= 0.501 * torch.finfo(dtype).eps * exact.abs()[off]).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_what_the_flows_did(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool
) -> None:
    """Also its gradient; against double precision, so that the bounds are our own roundings."""
    x = normal(*shape, dtype=dtype).to(device)
    x = (channels_innermost(x) if channels_last else x).requires_grad_()
    exact = x.detach().cpu().double().requires_grad_()
    y = ops.concat_elu(x, KEY.tensor(device), 0.3, step=5)
    expected = as_the_flows_did(exact, KEY.tensor(), 0.3, step=5)
    assert torch.equal(y == 0, expected.to(device) == 0)
    eps = torch.finfo(dtype).eps
    for ours, other in ((y, expected), (gradient(y, x), gradient(expected, exact))):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.cpu().double(), other, rtol=2 * eps, atol=3 * eps)


def test_the_reference_has_the_gradient_of_its_own_result() -> None:
    x = normal(2, 3, 5, dtype=torch.float64).requires_grad_()
    for rng, p in ((None, 0.0), (KEY.tensor(), 0.4)):
        y = reference.concat_elu(x, rng, p, step=2)
        grad_y = normal(2, 6, 5, dtype=torch.float64)
        (expected,) = torch.autograd.grad(y, x, grad_y)
        found = reference.concat_elu_gradient(grad_y, y, rng, p, step=2)
        torch.testing.assert_close(found, expected)


# --- the mask -------------------------------------------------------------------------------------


def mask_of(shape: tuple[int, ...], rng: Tensor, p: float, step: int = 0) -> Tensor:
    """(B, 2C): which channels are kept."""
    ones = torch.ones(shape, device=rng.device)
    kept = (ops.concat_elu(ones, rng, p, step=step) != 0).flatten(2)
    assert torch.equal(kept.all(-1), kept.any(-1))
    return kept.all(-1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 126, 127, 252, 300])
def test_the_mask_is_that_of_uniform(device: torch.device, channels: int) -> None:
    for p, key in ((0.2, KEY), (0.7, Key(2**63 + 9, 2**31, chain=2**33))):
        rng = key.tensor(device)
        expected = ops.uniform((3, 2 * channels), rng, step=7) >= p
        for sizes in ((1,), (7,), (3, 2)):
            assert torch.equal(mask_of((3, channels, *sizes), rng, p, 7), expected)


def test_the_mask_of_the_backward_pass_is_the_same(device: torch.device) -> None:
    """At 0 the slope is 1 wherever x is kept."""
    rng, half = KEY.tensor(device), 2
    for channels, innermost in ((6, False), (6, True), (300, False), (300, True)):
        x = torch.zeros(2, channels, 5, device=device)
        x = (channels_innermost(x) if innermost else x).requires_grad_()
        kept = ops.uniform((2, 2 * channels), rng) >= 0.5
        for side, sign in enumerate((1, -1)):
            grad_y = torch.zeros(2, half, channels, 5, device=device)
            grad_y[:, side] = 1
            y = ops.concat_elu(x, rng, 0.5)
            (found,) = torch.autograd.grad(y, x, grad_y.view(2, half * channels, 5))
            expected = 2.0 * sign * kept.view(2, half, channels)[:, side]
            assert torch.equal(found, expected[..., None].expand(found.shape))


def test_uniforms_that_are_p_itself_are_kept(device: torch.device) -> None:
    """Float32 uniforms are compared with p as a float32, as torch does."""
    rng = KEY.tensor(device)
    u = ops.uniform((1, 8), rng)
    for value in u.flatten().tolist():
        for p in (value, math.nextafter(value, 1), math.nextafter(value, 0)):
            assert torch.equal(mask_of((1, 4, 3), rng, p), u >= p)


@pytest.mark.parametrize("p", [1e-9, 2.0**-24, 0.999, 1 - 2.0**-24, 1 - 2.0**-40])
def test_probabilities_near_the_ends(device: torch.device, p: float) -> None:
    rng = KEY.tensor(device)
    assert torch.equal(mask_of((4, 500, 2), rng, p), ops.uniform((4, 1000), rng) >= p)


def test_without_a_key_or_a_probability_nothing_is_dropped(device: torch.device) -> None:
    x, rng = normal(2, 3, 4).to(device), KEY.tensor(device)
    plain = ops.concat_elu(x)
    for y in (ops.concat_elu(x, rng), ops.concat_elu(x, None, 0.5), ops.concat_elu(x, rng, 0.0)):
        assert torch.equal(y, plain)


# --- layout and memory ----------------------------------------------------------------------------


def layouts(x: Tensor) -> dict[str, Tensor]:
    B, C, H, W = x.shape
    wide = torch.zeros(B, 2 * C, H + 1, 3 * W, dtype=x.dtype, device=x.device)
    wide[:, ::2, 1:, ::3] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=LAST),
        "width before height": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch innermost": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "with gaps": wide[:, ::2, 1:, ::3],
        "some channels of more": torch.cat((x, x), 1).contiguous(memory_format=LAST)[:, :C],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_strides_do_not_change_a_bit(device: torch.device, dtype: torch.dtype, p: float) -> None:
    rng = KEY.tensor(device)
    x = normal(2, 6, 4, 5, dtype=dtype).to(device).requires_grad_()
    y = ops.concat_elu(x, rng, p)
    grad_y = normal(*y.shape, dtype=dtype).to(device)
    (expected,) = torch.autograd.grad(y, x, grad_y)
    for name, strided in layouts(x.detach()).items():
        leaf = strided.requires_grad_()
        ours = ops.concat_elu(leaf, rng, p)
        assert torch.equal(ours, y), name
        for other, given in layouts(grad_y).items():
            (found,) = torch.autograd.grad(ours, leaf, given, retain_graph=True)
            assert torch.equal(found, expected), (name, other)
    ones = torch.ones_like(y)
    (found,) = torch.autograd.grad(ops.concat_elu(x, rng, p).sum(), x)  # expanded
    assert torch.equal(found, torch.autograd.grad(ops.concat_elu(x, rng, p), x, ones)[0])


@pytest.mark.parametrize("where", ["the device", "meta"])
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 4, 1), (2, 3, 7), (2, 3, 1, 1), (2, 3, 2, 3, 4), (2, 3)],
    ids=str,
)
def test_the_result_lies_as_x_lies(
    device: torch.device, shape: tuple[int, ...], where: str
) -> None:
    x = normal(*shape).to(device if where == "the device" else "meta")
    for given in (x, channels_innermost(x)):
        leaf = given.detach().requires_grad_()
        y = ops.concat_elu(leaf)
        (grad_x,) = torch.autograd.grad(y, leaf, torch.zeros_like(y))
        for t in (y, grad_x):
            if given is x:
                assert t.is_contiguous()
            else:
                assert t.movedim(1, -1).is_contiguous()
        if len(shape) == 4 and math.prod(shape[2:]) > 1:
            # As torch names it, where a single channel leaves it open.
            assert (y.stride(1) == 1) == (given.stride(1) == 1)


def test_what_fills_no_layout_becomes_contiguous(device: torch.device) -> None:
    for name, x in layouts(normal(2, 6, 4, 5).to(device)).items():
        y = ops.concat_elu(x)
        assert y.is_contiguous(memory_format=LAST if name == "channels_last" else
                               torch.contiguous_format), name  # fmt: skip


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_each_pass_is_one_operator_and_keeps_the_result_alone(device: torch.device) -> None:
    x = normal(2, 6, 4, 4).to(device).contiguous(memory_format=LAST).requires_grad_()
    grad_y, rng = torch.ones(2, 12, 4, 4, device=device), KEY.tensor(device)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with _Operators() as mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = ops.concat_elu(x, rng, 0.3)
        y.backward(grad_y)
    assert [name for name in mode.names if name.startswith("coopflow")] == [
        "coopflow::concat_elu", "coopflow::concat_elu_backward",
    ]  # fmt: skip
    assert {name for name in mode.names if name.startswith("aten")} <= {"aten::detach"}
    assert {t.data_ptr() for t in kept} == {y.data_ptr(), rng.data_ptr()}


def test_gradients_do_not_know_their_batch_nor_the_threads(device: torch.device) -> None:
    x, before = normal(5, 70, 30, 20).to(device), torch.get_num_threads()

    def of(first: int, last: int, innermost: bool) -> Tensor:
        part = x[first:last].clone()
        part = (channels_innermost(part) if innermost else part).requires_grad_()
        rng = KEY.at_chain(KEY.chain + first).tensor(device)
        y = ops.concat_elu(part, rng, 0.2)
        return torch.autograd.grad(y.square().sum(), part)[0]

    for innermost in (False, True):
        whole = of(0, 5, innermost)
        for first, last in ((2, 3), (1, 4)):
            assert torch.equal(of(first, last, innermost), whole[first:last])
        try:
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                assert torch.equal(of(0, 5, innermost), whole)
        finally:
            torch.set_num_threads(before)


_FINGERPRINT = """
import hashlib, torch
import coopflow_ext as cf
digest, rng = hashlib.sha256(), cf.Key(5, 3, 7).tensor()
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for shape in ((2, 70, 9), (3, 5, 4, 4)):
        x = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
        for given in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            leaf = given.requires_grad_()
            y = cf.ops.concat_elu(leaf, rng, 0.2)
            for t in (y, torch.autograd.grad(y.sin().sum(), leaf)[0]):
                digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_instruction_sets_give_the_same_bits() -> None:
    prints = fingerprints(_FINGERPRINT)
    assert len(set(prints.values())) == 1, prints


# --- what is not finite, empty --------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_pytorch_has_it(device: torch.device, value: float) -> None:
    """Kept and dropped, in x and in the gradient of the result. Where a result is NaN, so is the
    gradient, which is taken from it; torch's is there for some lengths of a vector."""
    rng = KEY.tensor(device)
    x = normal(4, 8, 3).to(device)
    x[:, :, 0] = value
    grad_y = normal(4, 16, 3).to(device)
    grad_y[:, :, 2] = value
    ours, plain = (x.clone().requires_grad_() for _ in range(2))
    y, expected = ops.concat_elu(ours, rng, 0.4), as_the_flows_did(plain, rng, 0.4)
    torch.testing.assert_close(y, expected, equal_nan=True)
    (found,) = torch.autograd.grad(y, ours, grad_y)
    (wanted,) = torch.autograd.grad(expected, plain, grad_y)
    undefined = y.isnan().view(4, 2, 8, 3).any(1)
    assert undefined.any()
    assert found[undefined].isnan().all()
    torch.testing.assert_close(found[~undefined], wanted[~undefined], equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 3, 0), (0, 3, 4, 4)])
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    batch, channels, *sizes = shape
    for x in (torch.empty(shape, device=device), channels_innermost(torch.empty(shape))):
        leaf = x.to(device).requires_grad_()
        y = ops.concat_elu(leaf, KEY.tensor(device), 0.2)
        assert y.shape == (batch, 2 * channels, *sizes)
        y.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == shape


# --- bad input ------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    x, rng = normal(2, 3, 4).to(device), KEY.tensor(device)
    for arguments, options, error, message in (
        ((x[0, 0],), {}, ValueError, r"x: must have shape \(B, C, \.\.\.\), got \(4,\)"),
        ((x.long(),), {}, TypeError, r"x: must have dtype float32, .*got .*int64"),
        ((x, rng.int(), 0.2), {}, TypeError, r"rng: must have dtype int64"),
        ((x, rng[:2], 0.2), {}, ValueError, r"rng: must have shape \(3,\)"),
        ((x, rng[:2]), {}, ValueError, r"rng: must have shape \(3,\)"),
        ((x, rng, 1.0), {}, ValueError, r"p: must be in \[0, 1\), got 1"),
        ((x, None, 1.0), {}, ValueError, r"p: must be in \[0, 1\), got 1"),
        ((x, rng, -0.1), {}, ValueError, r"p: must be in \[0, 1\), got -0.1"),
        ((x, rng, math.nan), {}, ValueError, r"p: must be in \[0, 1\), got nan"),
        ((x, rng, "a"), {}, TypeError, r"\bp\b"),
        ((x, rng, 0.2), {"step": -1}, ValueError, r"step: must be in"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            ops.concat_elu(*arguments, **options)


def test_the_raw_derivative_checks_what_it_is_given() -> None:
    y = torch.ops.coopflow.concat_elu(normal(2, 3, 4))
    for wrong, message in (
        ((y[:1], y), "grad_y: must have the shape of y"),
        ((y.double(), y), "grad_y: must have dtype float32"),
        ((y[:, :5], y[:, :5]), "y: must have an even number of channels, got shape .2, 5, 4"),
        ((y[0, 0], y[0, 0]), r"y: must have shape \(B, C"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.coopflow.concat_elu_backward(*wrong)


# --- in the flow ----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_the_flows_layer_has_the_mask_that_it_had(memory_format: torch.memory_format) -> None:
    layer = flows.gated.GatedConv(8, dropout=0.3, aux_channels=3)
    layer.dropout.index = 4
    x = normal(3, 8, 6, 5).contiguous(memory_format=memory_format)
    aux, rng = normal(3, 3, 6, 5), KEY.tensor()
    never = 0.0
    h = layer.conv(as_the_flows_did(x, rng, never))
    h = h + layer.aux(as_the_flows_did(aux, rng, never))
    gates = layer.gate(as_the_flows_did(h, rng, 0.3, step=4))
    torch.testing.assert_close(layer(x, flows.Context(aux, rng)), gates, rtol=1e-5, atol=1e-6)
