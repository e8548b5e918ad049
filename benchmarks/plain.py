"""The operators of a flow's networks in plain PyTorch, with the arguments of ours: what a benchmark
puts in their place where it runs a whole model without them.

Masks come from ``uniform``, by default the ops' own, so that they are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from coopflow_ext import ops

Uniform = Callable[..., Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rng: Tensor,
    p: float,
    *,
    step: int = 0,
    uniform: Uniform = ops.uniform,
) -> Tensor:
    """With scores and mask in memory."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    mask = (uniform(scores.shape, rng, step=step) >= p).to(q.dtype) / (1 - p)
    return scores.softmax(-1) * mask @ v


def concat_elu(
    x: Tensor,
    rng: Tensor | None = None,
    p: float = 0.0,
    *,
    step: int = 0,
    uniform: Uniform = ops.uniform,
) -> Tensor:
    """Negation, concatenation, ELU in place, and with dropout a mask and a product."""
    y = functional.elu(torch.cat((x, -x), dim=1), inplace=True)
    if rng is None or p == 0:
        return y
    mask = (uniform(y.shape[:2], rng, step=step) >= p).to(y.dtype) / (1 - p)
    return y * mask[..., None, None]


def weight_norm(directions: Sequence[Tensor], gains: Sequence[Tensor]) -> list[Tensor]:
    """A call of torch's operator for each layer."""
    return [torch._weight_norm(v, g, 0) for v, g in zip(directions, gains, strict=True)]


def gate_add_norm(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """GLU, sum and LayerNorm."""
    sums = x + functional.glu(gates, -1)
    return functional.layer_norm(sums, weight.shape, weight, bias, eps)
