"""Self-attention whose weights are dropped by a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coopflow_ext import reference
from coopflow_ext._tensors import arithmetic_dtype, check_tensors
from coopflow_ext.errors import reason
from coopflow_ext.ops import _call

ATTENTION_MAX_DIM = 64
"""The largest d of :func:`attention` with dropout: what a block of a GPU holds."""

Three = tuple[Tensor, Tensor, Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rng: Tensor,
    p: float,
    *,
    step: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over the positions of every head, with dropout of the weights by a key.

    Neither the L × L scores nor the mask are ever in memory: both passes walk through them in tiles
    and draw the mask anew, so that memory grows as L·d. Sums are in float32 (float64 for double)
    and in a fixed order. On CUDA bfloat16 has its products on tensor cores, for which weights and
    the gradients of scores are rounded to it, as PyTorch's own attention does. Second derivatives
    are the reference's, which has the weights in memory.

    Equivalent to::

        weights = (q @ k.mT * (d**-0.5 if scale is None else scale)).softmax(-1)
        kept = ops.uniform((B, H, L, L), rng, step=step) >= p
        return (weights * kept / (1 - p)) @ v

    but for p = 0, which is :func:`torch.nn.functional.scaled_dot_product_attention`: it has second
    derivatives inside of ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` alone.

    Args:
        q, k, v: (B, H, L, d), d ≤ 64, of one floating dtype and any strides.
        rng: (seed, time, chain), as ``Key.tensor`` gives it; dimension 0 counts the chains.
        p: probability that a weight is dropped, 0 ≤ p < 1.
        step: added to the key's time.
        scale: of the scores; None: d^{−1/2}.

    Returns:
        (B, H, L, d) of q's dtype, which lies in memory as (B, L, H, d). A row whose scores are not
        all finite or −∞ is NaN.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    check_tensors(q=q, k=k, v=v, rng=rng)
    if isinstance(p, (int, float)) and p == 0:
        try:
            return functional.scaled_dot_product_attention(q, k, v, scale=scale)
        except RuntimeError as error:
            raise ValueError(f"attention: q, k and v do not fit: {reason(error)}") from error
    if torch.compiler.is_compiling():
        # Dynamo does not see that an argument of func.grad requires grad; of a view it does.
        q, k, v = q.view_as(q), k.view_as(k), v.view_as(v)
    try:
        out, _ = _call.apply(_ATTENTION, q, k, v, rng, p, step, scale)
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    mixed: Tensor = out
    return mixed


def split_heads(projected: Tensor) -> Three:
    """Keys, values and queries (B, H, L, d) of what one projection made of every position,
    (B, L, 3, H, d), whose gradient is that of the three without a copy if it comes from
    :func:`attention`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found: Three = _SplitHeads.apply(projected)  # type: ignore[no-untyped-call]
        return found
    return _split(projected)


def _split(heads: Tensor) -> Three:
    k, v, q = (of.transpose(1, 2) for of in heads.unbind(2))
    return k, v, q


def _stacked(*parts: Tensor) -> Tensor:
    return torch.stack([part.transpose(1, 2) for part in parts], dim=2)


def _lie_side_by_side(parts: Sequence[Tensor]) -> bool:
    """As those of one tensor (B, L, 3, H, d)."""
    first = parts[0]
    _, H, L, d = first.shape
    strides = (3 * L * H * d, d, 3 * H * d, 1)
    return all(
        part.stride() == strides
        and part.storage_offset() == first.storage_offset() + i * H * d
        and part.untyped_storage()._cdata == first.untyped_storage()._cdata
        for i, part in enumerate(parts)
    )


class _SplitHeads(torch.autograd.Function):
    """(B, L, 3, H, d) -> its three parts, as (B, H, L, d)."""

    @staticmethod
    def forward(projected: Tensor) -> Three:
        return _split(projected)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Three) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # A second derivative has to know all three.
        if torch.is_grad_enabled() or not _lie_side_by_side(grads):
            return _stacked(*grads)
        B, H, L, d = grads[0].shape
        row = 3 * H * d
        return grads[0].as_strided((B, L, 3, H, d), (L * row, row, H * d, d, 1))


class Attention(torch.autograd.Function):
    """(q, k, v, rng, p, step, scale) -> (out, log-sum-exp of the scores)."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _call.compute("attention", *inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, rng, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        _call.leave_unused(ctx)
        ctx.save_for_backward(q, k, v, rng, *output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 7
        heads: Tensor = _call.apply(_ATTENTION_BACKWARD, grad_out, *ctx.saved_tensors, *ctx.options)
        k, v, q = _split(heads)
        return (q, k, v, None, None, None, None)


class AttentionBackward(torch.autograd.Function):
    """(grad_out, q, k, v, rng, out, lse, p, step, scale) -> gradients of k, v and q, as heads."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        result: Tensor = _call.compute("attention_backward", *inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_out, q, k, v, rng, _, _, *ctx.options = inputs
        ctx.save_for_backward(grad_out, q, k, v, rng)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`out` and `lse` are functions of q, k and v, and so are the gradients without them."""
        *differentiable, rng = ctx.saved_tensors
        p, step, scale = ctx.options

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference.attention(q, k, v, rng, p, step=step, scale=scale)

        def gradients(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found: Three = _call.pull_back(mix, q, k, v)(grad_out)
            grad_q, grad_k, grad_v = found
            return _stacked(grad_k, grad_v, grad_q)

        pull_back = _call.pull_back(gradients, *differentiable)
        return (*pull_back(grad), *[None] * 6)


def _like(q: Tensor) -> Tensor:
    B, H, L, d = q.shape
    return q.new_empty(B, L, H, d).transpose(1, 2)


def _shapes(q: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:-1], dtype=arithmetic_dtype(q.dtype))


def _backward_shapes(grad_out: Tensor, q: Tensor, *others: Any, **options: Any) -> Tensor:
    B, H, L, d = q.shape
    return q.new_empty(B, L, 3, H, d)


def _flops(q: Sequence[int], *others: Any, **options: Any) -> int:
    """Scores and mixing: two products of L × d by d × L for every head."""
    B, H, L, d = q
    return 2 * 2 * B * H * L * L * d


def _backward_flops(grad_out: Sequence[int], *others: Any, **options: Any) -> int:
    """Five such products, of which one is the scores again, as torch counts its fused attention."""
    return 5 * _flops(grad_out) // 2


_call.register_autograd("attention", Attention)
_call.register_flops("attention", _flops)
_call.register_flops("attention_backward", _backward_flops)
_call.register_fake("attention", _shapes)
_ATTENTION = _call.positional("attention", Attention)
_call.register_autograd("attention_backward", AttentionBackward)
_call.register_fake("attention_backward", _backward_shapes)
_ATTENTION_BACKWARD = _call.positional("attention_backward", AttentionBackward)
