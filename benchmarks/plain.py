"""The operators of a flow in plain PyTorch, with the arguments of ours, as one would write them or
as they were published: what a benchmark puts in their place where it runs a model without them.

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


def mixture_logistic_log_cdf(
    x: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor
) -> Tensor:
    """log F(x) alone."""
    below = functional.logsigmoid((x.unsqueeze(1) - means) * (-log_scales).exp())
    return (log_weights + below).logsumexp(1)


def mixture_logistic_coupling_inverse(
    y: Tensor, params: Tensor, *, affine: bool = True, legacy_cdf_clamp: bool = True
) -> tuple[Tensor, Tensor]:
    """The published inverse: bisection over the whole batch by F alone, which is clamped to
    [1e-5, 1 − 1e-5]; it has no other options.

    Source: AlvinZhuyx/CoopFlow, models/flowplusplus, coupling.py and log_dist.py, but for the
    weights' softmax, which is taken once instead of at each iteration.
    """
    if not (affine and legacy_cdf_clamp):
        raise ValueError("the published inverse is affine and clamps the CDF")
    components = (params.shape[1] - 2) // 3
    a, b, logits, means, log_scales = params.split((1, 1, *3 * [components]), dim=1)
    a, b, log_weights = a.squeeze(1), b.squeeze(1), logits.log_softmax(1)
    log_scales = log_scales.clamp(min=-7)
    v = y * (-a).exp() - b
    wanted = v.sigmoid().clamp(1e-5, 1 - 1e-5)
    reach = 20 * log_scales.exp().sum(1, keepdim=True)
    low, high = (means - reach).amin(1), (means + reach).amax(1)
    x = torch.zeros_like(y)
    for _ in range(100):
        too_high = mixture_logistic_log_cdf(x, log_weights, means, log_scales).exp() > wanted
        high = torch.where(too_high, x, high)
        low = torch.where(too_high, low, x)
        middle = torch.where(too_high, x + low, x + high) / 2
        moved = (middle - x).abs().max()
        x = middle
        if moved <= 1e-10:
            break
    t = (x.unsqueeze(1) - means) * (-log_scales).exp()
    log_density = (log_weights + t - log_scales - 2 * functional.softplus(t)).logsumexp(1)
    ladj = log_density + functional.softplus(v) + functional.softplus(-v) + a
    return x, -ladj.flatten(1).sum(1)
