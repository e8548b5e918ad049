"""Attention with dropout by key: its mask, memory, lengths and dimensions, what is not finite, and
bad input. The laws of every op are in test_ops.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from instruction_sets import fingerprints
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from coopflow_ext import Key, flows, ops, reference
from coopflow_ext.ops.attention import split_heads

LENGTHS = (1, 7, 64, 65, 257)
DIMS = (8, 20, 32, 64)
KEY = Key(0xDEADBEEF12345678, time=3, chain=11)


def inputs(
    length: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    heads: int = 3,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (batch, heads, length, dim)
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def gradients(out: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a sum in which every element counts, differently."""
    weights = torch.arange(out.numel(), dtype=torch.float64).mul(1.7).sin().view(out.shape)
    return torch.autograd.grad(out, given, weights.to(out))


def with_scores_in_memory(
    q: Tensor, k: Tensor, v: Tensor, rng: Tensor, p: float, step: int = 0
) -> Tensor:
    """What the flows did before there was an op."""
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    mask = (ops.uniform(weights.shape, rng, step=step) >= p).to(q.dtype) / (1 - p)
    return weights * mask @ v


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 1.6e-2)]
)
def test_is_the_formula_with_scores_in_memory(
    device: torch.device, dtype: torch.dtype, bound: float, length: int, dim: int
) -> None:
    """Also its gradients; each bound is a part of the largest number, at least of 1."""
    given = leaves(*inputs(length, dim, dtype, batch=1 if length > 65 else 2, device=device))
    rng = KEY.tensor(device)
    out = ops.attention(*given, rng, 0.2, step=5)
    exact = leaves(*(t.cpu().double() for t in given))
    expected = with_scores_in_memory(*exact, KEY.tensor(), 0.2, step=5)
    assert out.dtype == dtype
    pairs = zip((out, *gradients(out, given)), (expected, *gradients(expected, exact)), strict=True)
    for ours, other in pairs:
        torch.testing.assert_close(
            ours.double().cpu(), other, rtol=0, atol=bound * max(1.0, other.abs().max().item())
        )


def test_bfloat16_is_no_worse_than_pytorch_in_bfloat16(device: torch.device) -> None:
    """Ours rounds results alone; PyTorch rounds the weights, too."""
    given, rng = inputs(257, 24, torch.bfloat16, device=device), KEY.tensor(device)
    ours, plain = leaves(*given), leaves(*given)
    exact = leaves(*(t.double() for t in given))
    results = []
    for op, of in (
        (ops.attention, ours),
        (with_scores_in_memory, plain),
        (reference.attention, exact),
    ):
        out = op(*of, rng, 0.2)
        results.append((out, *gradients(out, of)))
    for one, other, true in zip(*results, strict=True):
        error, plain_error = ((t.double() - true).abs().max() for t in (one, other))
        assert error <= 2 * plain_error


def test_scale_is_that_of_the_scores(device: torch.device) -> None:
    q, k, v = inputs(9, 16, device=device)
    rng = KEY.tensor(device)
    for scale in (0.3, -1.5, 0.0):
        torch.testing.assert_close(
            ops.attention(q, k, v, rng, 0.2, scale=scale),
            reference.attention(q, k, v, rng, 0.2, scale=scale),
        )


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    q, k, v = inputs(70, 16, torch.float32, device=device)
    given, rng = leaves(100 * q, 100 * k, v), KEY.tensor(device)
    exact = leaves(*(t.double() for t in given))
    out, expected = ops.attention(*given, rng, 0.2), reference.attention(*exact, rng, 0.2)
    # Scores of some 10⁵ have an ulp of 2⁻⁷, and so have the logarithms of weights.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-2)
    assert all(t.isfinite().all() for t in gradients(out, given))


# --- the mask -------------------------------------------------------------------------------------


def mask_of(length: int, rng: Tensor, p: float, step: int, **shape: int) -> Tensor:
    """(B, H, L, L): which weights are kept, read off attention that weighs every value alike.

    Values are unit vectors, so that element d of the result is the weight of one position.
    """
    batch, heads = shape["batch"], shape["heads"]
    zeros = torch.zeros(batch, heads, length, min(length, 64), device=rng.device)
    rows = []
    for first in range(0, length, 64):
        values = zeros.clone()
        count = min(64, length - first)
        values[:, :, first : first + count, :count] = torch.eye(count, device=rng.device)
        rows.append(ops.attention(zeros, zeros, values, rng, p, step=step)[..., :count] > 0)
    return torch.cat(rows, dim=-1)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 64, 65, 130])
def test_the_mask_is_that_of_uniform(device: torch.device, length: int) -> None:
    for p, key in ((0.2, KEY), (0.7, Key(2**63 + 9, 2**31, chain=2**33))):
        rng = key.tensor(device)
        expected = ops.uniform((3, 2, length, length), rng, step=7) >= p
        assert torch.equal(mask_of(length, rng, p, 7, batch=3, heads=2), expected)


def test_the_mask_of_the_backward_pass_is_the_same(device: torch.device) -> None:
    """Of weights all alike, value j has as its gradient what the rows have that keep it."""
    for length in (7, 64, 65):
        v = inputs(length, 64, torch.float64, device=device)[2].requires_grad_()
        zeros, rng = torch.zeros_like(v), KEY.tensor(device)
        kept = ops.uniform((2, 3, length, length), rng) >= 0.4
        for first in range(0, length, 64):
            grad_out = torch.zeros_like(v)
            count = min(64, length - first)
            grad_out[:, :, first : first + count, :count] = torch.eye(count, device=device)
            (found,) = torch.autograd.grad(ops.attention(zeros, zeros, v, rng, 0.4), v, grad_out)
            rows = kept[:, :, first : first + count].transpose(-1, -2)
            assert torch.equal(found[..., :count] > 0, rows)


def test_uniforms_that_are_p_itself_are_kept(device: torch.device) -> None:
    """Float32 uniforms are compared with p as a float32, as torch does."""
    rng = KEY.tensor(device)
    u = ops.uniform((1, 1, 4, 4), rng)
    for value in u.flatten().tolist():
        for p in (value, math.nextafter(value, 1), math.nextafter(value, 0)):
            assert torch.equal(mask_of(4, rng, p, 0, batch=1, heads=1), u >= p)


@pytest.mark.parametrize("p", [1e-9, 2.0**-24, 0.999, 1 - 2.0**-24, 1 - 2.0**-40])
def test_probabilities_near_the_ends(device: torch.device, p: float) -> None:
    rng = KEY.tensor(device)
    expected = ops.uniform((2, 2, 30, 30), rng) >= p
    assert torch.equal(mask_of(30, rng, p, 0, batch=2, heads=2), expected)


# --- layout and memory ----------------------------------------------------------------------------


def layouts(t: Tensor) -> dict[str, Tensor]:
    B, H, L, d = t.shape
    wide = torch.zeros(B, H + 1, 2 * L, 3 * d, dtype=t.dtype, device=t.device)
    wide[:, 1:, ::2, ::3] = t
    return {
        "heads innermost": t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "a projection's": t.transpose(1, 2).contiguous().transpose(1, 2),
        "with gaps": wide[:, 1:, ::2, ::3],
        "batch innermost": t.movedim(0, -1).contiguous().movedim(-1, 0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_change_a_bit(device: torch.device, dtype: torch.dtype) -> None:
    given, rng = inputs(65, 20, dtype, device=device), KEY.tensor(device)
    plain = leaves(*given)
    expected = gradients(ops.attention(*plain, rng, 0.2), plain)
    for name in layouts(given[0]):
        strided = tuple(layouts(t)[name].detach().requires_grad_() for t in given)
        out = ops.attention(*strided, rng, 0.2)
        for one, other in zip(gradients(out, strided), expected, strict=True):
            assert torch.equal(one, other), name
    expanded = given[0][:, :, :1].expand_as(given[0])
    assert torch.equal(
        ops.attention(*[expanded] * 3, rng, 0.2),
        ops.attention(*[expanded.contiguous()] * 3, rng, 0.2),
    )


def test_gradients_do_not_know_their_batch_nor_the_threads(device: torch.device) -> None:
    given, before = inputs(70, 12, torch.float32, batch=5, device=device), torch.get_num_threads()

    def of(first: int, last: int) -> tuple[Tensor, ...]:
        part = leaves(*(t[first:last] for t in given))
        rng = KEY.at_chain(KEY.chain + first).tensor(device)
        return torch.autograd.grad(ops.attention(*part, rng, 0.2).square().sum(), part)

    whole = of(0, 5)
    for first, last in ((2, 3), (1, 4)):
        assert all(
            torch.equal(one, other[first:last])
            for one, other in zip(of(first, last), whole, strict=True)
        )
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, of(0, 5), whole))
    finally:
        torch.set_num_threads(before)


_FINGERPRINT = """
import hashlib, torch
import coopflow_ext as cf
digest, rng = hashlib.sha256(), cf.Key(5, 3, 7).tensor()
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for length, dim in ((70, 20), (5, 9)):
        g = torch.Generator().manual_seed(0)
        leaves = [torch.randn((2, 3, length, dim), generator=g).to(dtype) for _ in range(3)]
        leaves = [t.requires_grad_() for t in leaves]
        out = cf.ops.attention(*leaves, rng, 0.2)
        for t in (out, *torch.autograd.grad(out.sin().sum(), leaves)):
            digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_instruction_sets_give_the_same_bits() -> None:
    prints = fingerprints(_FINGERPRINT)
    assert len(set(prints.values())) == 1, prints


def test_a_grad_out_of_any_strides(device: torch.device) -> None:
    given, rng = leaves(*inputs(33, 12, torch.float32, device=device)), KEY.tensor(device)
    out = ops.attention(*given, rng, 0.2)
    grad_out = torch.randn(out.shape).to(out)
    expected = torch.autograd.grad(out, given, grad_out, retain_graph=True)
    for name, strided in layouts(grad_out).items():
        found = torch.autograd.grad(out, given, strided, retain_graph=True)
        assert all(map(torch.equal, found, expected)), name
    ones = torch.ones_like(out)
    found = torch.autograd.grad(out.sum(), given, retain_graph=True)  # expanded
    assert all(map(torch.equal, found, torch.autograd.grad(out, given, ones)))


def test_joining_the_heads_moves_no_data(device: torch.device) -> None:
    q, k, v = leaves(*inputs(9, 8, device=device))
    out = ops.attention(q, k, v, KEY.tensor(device), 0.2)
    assert out.transpose(1, 2).is_contiguous()


class _Operators(TorchDispatchMode):
    """Names of those that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_the_gradient_of_a_projection_is_not_copied(device: torch.device) -> None:
    """But for a second derivative, and where gradients come from elsewhere."""
    rng = KEY.tensor(device)
    plain = torch.randn(2, 9, 3, 4, 8, dtype=torch.float64).to(device)

    def gradient(mixed_by: Any, split: Any, **options: Any) -> tuple[Tensor, bool]:
        projected = plain.clone().requires_grad_()
        k, v, q = split(projected)
        out = mixed_by(q, k, v, rng, 0.2).sin().sum()
        with _Operators() as operators:
            (found,) = torch.autograd.grad(out, projected, **options)
        return found, "aten::stack" in operators.names

    def unbound(projected: Tensor) -> list[Tensor]:
        return [part.transpose(1, 2) for part in projected.unbind(2)]

    expected, copied = gradient(ops.attention, unbound)
    assert copied
    ours, copied = gradient(ops.attention, split_heads)
    assert torch.equal(ours, expected)
    assert ours.is_contiguous()
    assert not copied
    other, copied = gradient(reference.attention, split_heads)
    torch.testing.assert_close(other, expected)
    assert copied
    twice, _ = gradient(ops.attention, split_heads, create_graph=True)
    assert torch.equal(twice, expected)
    swapped, copied = gradient(lambda q, k, v, *of: ops.attention(v, k, q, *of), split_heads)
    assert copied
    assert torch.equal(
        swapped, gradient(lambda q, k, v, *of: ops.attention(v, k, q, *of), unbound)[0]
    )


def test_gradients_of_a_projection_that_come_from_several_buffers(device: torch.device) -> None:
    """Or from the middle of one."""
    shape = (2, 5, 3, 2, 8)
    buffers = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    several = [buffer.clone()[:, :, i].transpose(1, 2) for i, buffer in enumerate(buffers)]
    behind = [part.transpose(1, 2) for part in buffers[1].unbind(2)]
    for grads in (several, behind):
        projected = torch.randn(shape).to(device).requires_grad_()
        (found,) = torch.autograd.grad(split_heads(projected), projected, grads)
        assert torch.equal(found, torch.stack([grad.transpose(1, 2) for grad in grads], 2))


def test_second_derivatives_of_a_projection(device: torch.device) -> None:
    rng = KEY.tensor(device)
    projected = torch.randn(2, 3, 3, 1, 4, dtype=torch.float64).to(device).requires_grad_()

    def mixed(projected: Tensor) -> Tensor:
        k, v, q = split_heads(projected)
        return ops.attention(q, k, v, rng, 0.2)

    assert torch.autograd.gradcheck(mixed, projected)
    assert torch.autograd.gradgradcheck(mixed, projected)


class _Largest(TorchDispatchMode):
    """Elements of the largest storage that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                size = t.untyped_storage().nbytes() // t.element_size()
                self.elements = max(self.elements, size)
        return out


def test_no_operator_makes_a_tensor_of_scores(device: torch.device) -> None:
    """Nor is one kept for the backward pass."""
    length, dim = 512, 8
    given = leaves(*inputs(length, dim, torch.float32, batch=1, heads=1, device=device))
    saved = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t.untyped_storage().nbytes() // t.element_size())
        return t

    with _Largest() as mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ops.attention(*given, KEY.tensor(device), 0.2).sum().backward()
    assert 0 < mode.elements <= 3 * length * dim
    assert sum(saved) <= 4 * length * dim + length + 3  # q, k, v, out, log-sum-exp, rng


# --- p = 0, what is not finite, empty -------------------------------------------------------------


def test_without_dropout_it_is_torchs_own(device: torch.device) -> None:
    q, k, v = inputs(17, 80, torch.float32, device=device)
    for scale in (None, 0.2):
        ours = ops.attention(q, k, v, KEY.tensor(device), 0.0, scale=scale)
        assert torch.equal(ours, functional.scaled_dot_product_attention(q, k, v, scale=scale))


def test_without_dropout_second_derivatives_need_torchs_formula(device: torch.device) -> None:
    given = leaves(*inputs(5, 4, device=device))
    with sdpa_kernel(SDPBackend.MATH):
        out = ops.attention(*given, KEY.tensor(device), 0.0)
    grads = torch.autograd.grad(out.sin().sum(), given, create_graph=True)
    expected = reference.attention(*given, KEY.tensor(device), 0.0)
    others = torch.autograd.grad(expected.sin().sum(), given, create_graph=True)
    for one, other in zip(grads, others, strict=True):
        seconds = (
            torch.autograd.grad(g.square().sum(), given, retain_graph=True) for g in (one, other)
        )
        torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_pytorch_has_it(
    device: torch.device, which: int, value: float
) -> None:
    given = inputs(70, 12, torch.float32, device=device)
    given[which][1, 0, 3, 5] = value
    ours, plain, rng = leaves(*given), leaves(*given), KEY.tensor(device)
    results = []
    for op, of in ((ops.attention, ours), (reference.attention, plain)):
        out = op(*of, rng, 0.2)
        results.append((out, *gradients(out, of)))
    out, expected = (of[0] for of in results)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    for one, other in zip(*results, strict=True):
        finite = other.isfinite()
        torch.testing.assert_close(one[finite], other[finite], rtol=1e-4, atol=1e-4)
        assert not one[~finite].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8)])
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    given = leaves(*[torch.empty(shape, device=device)] * 3)
    out = ops.attention(*given, KEY.tensor(device), 0.2)
    assert out.shape == shape
    out.sum().backward()
    assert all(t.grad is not None and t.grad.shape == shape for t in given)


# --- bad input ------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    q, k, v = inputs(5, 8, torch.float32, device=device)
    rng = KEY.tensor(device)
    wide = torch.zeros(2, 3, 5, ops.ATTENTION_MAX_DIM + 1, device=device)
    half = wide[..., :-1]
    ops.attention(half, half, half, rng, 0.2)
    for arguments, options, error, message in (
        ((q[0], k, v, rng, 0.2), {}, ValueError, r"q: must have shape \(B, H, L, d\), got \(3, 5"),
        ((wide, wide, wide, rng, 0.2), {}, ValueError, r"q: must have d from 1 to 64, got 65"),
        ((q, k[:, :, :4], v, rng, 0.2), {}, ValueError, r"k: must have the shape of q, .*8\), got"),
        ((q, k, v[..., :4], rng, 0.2), {}, ValueError, r"v: must have the shape of q"),
        ((q, k, v.double(), rng, 0.2), {}, TypeError, r"v: must have dtype float32, got .*64"),
        ((q.long(), k, v, rng, 0.2), {}, TypeError, r"q: must have dtype float32, .*got .*int64"),
        ((q, k, v, rng.int(), 0.2), {}, TypeError, r"rng: must have dtype int64"),
        ((q, k, v, rng[:2], 0.2), {}, ValueError, r"rng: must have shape \(3,\)"),
        ((q, k, v, rng, 1.0), {}, ValueError, r"p: must be in \[0, 1\), got 1"),
        ((q, k, v, rng, -0.1), {}, ValueError, r"p: must be in \[0, 1\), got -0.1"),
        ((q, k, v, rng, math.nan), {}, ValueError, r"p: must be in \[0, 1\), got nan"),
        ((q, k, v, rng, "a"), {}, TypeError, r"\bp\b"),
        ((q, k, v, rng, 0.2), {"step": -1}, ValueError, r"step: must be in"),
        ((q, k, v, rng, 0.2), {"scale": math.inf}, ValueError, r"scale: must be finite, got inf"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            ops.attention(*arguments, **options)


def test_more_weights_than_there_are_words() -> None:
    q = torch.zeros(1, 1, 1, 1).expand(1, 1, (1 << 17) + 1, 1)
    with pytest.raises(ValueError, match=r"q: must have H \* L \* L of at most 2\*\*34"):
        ops.attention(q, q, q, KEY.tensor(), 0.2)


def test_the_raw_derivative_checks_what_it_is_given() -> None:
    q, k, v = inputs(5, 8, torch.float32)
    rng = KEY.tensor()
    out, lse = torch.ops.coopflow.attention(q, k, v, rng, 0.2)
    for wrong, message in (
        ((q[:1], q, k, v, rng, out, lse), "grad_out: must have the shape of q"),
        ((q, q, k, v, rng, out.double(), lse), "out: must have dtype float32"),
        ((q, q, k, v, rng, out, lse[0]), r"lse: must have shape \(B, H, L\) of q"),
        ((q, q, k, v, rng, out, lse.double()), "lse: must have dtype float32"),
        ((q, q, k, v, rng, out, lse.transpose(0, 1).contiguous().transpose(0, 1)), "lse: must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.coopflow.attention_backward(*wrong, 0.2)


# --- in the flow ----------------------------------------------------------------------------------


def test_torch_counts_its_arithmetic() -> None:
    """Two products of L × d by d × L forward and five backward, like torch's fused attention."""
    q, k, v = (t.requires_grad_() for t in inputs(7, 8))
    product = 2 * (2 * 3) * 7 * 7 * 8
    with FlopCounterMode(display=False) as counter:
        out = ops.attention(q, k, v, KEY.tensor(), 0.3)
        assert counter.get_total_flops() == 2 * product
        out.sum().backward()
    assert counter.get_total_flops() == (2 + 5) * product


def test_the_flows_attention_has_the_mask_that_it_had() -> None:
    layer = flows.gated.GatedAttention(32, dropout=0.3)
    layer.dropout.index = 4
    x, positions = torch.randn(3, 50, 32), flows.gated.sinusoidal_positions(50, 32)
    context = flows.Context(dropout_rng=KEY.tensor())
    heads = layer.project(x + positions).view(3, 50, 3, 4, 8).permute(2, 0, 3, 1, 4)
    keys, values, queries = heads.unbind(0)
    mixed = with_scores_in_memory(queries, keys, values, KEY.tensor(), 0.3, step=4)
    gates = layer.gate(mixed.transpose(1, 2).reshape(3, 50, 32))
    torch.testing.assert_close(layer(x, positions, context), gates, rtol=1e-5, atol=1e-6)


def test_the_flows_attention_refuses_what_the_op_cannot_hold() -> None:
    flows.gated.GatedAttention(260)
    with pytest.raises(ValueError, match=r"channels must be at most 256 .* got 260"):
        flows.gated.GatedAttention(260, dropout=0.1)
