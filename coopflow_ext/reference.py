"""Every op of this package again, in plain PyTorch.

This module is the oracle of the tests, the documentation of the ops, and the baseline of the
benchmarks. It is written to be read, not to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coopflow_ext._tensors import (
    Coefficient,
    arithmetic_dtype,
    flat,
    norm_scale,
    per_chain_view,
    table_row,
)

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on words held in int64 tensors (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = c0 * _PHILOX_MULTIPLIERS[0]
        p1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0 = (k0 + _PHILOX_WEYL[0]) & _WORD
        k1 = (k1 + _PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3


def noise_words(batch: int, per_chain: int, rng: Tensor, *, step: int = 0) -> Tensor:
    """The words behind each chain's noise: (batch, ceil(per_chain / 4), 4), int64 in [0, 2³²)."""
    seed, time, first = rng[0], rng[1] + step, rng[2]
    blocks = torch.arange((per_chain + 3) // 4, device=rng.device)
    chains = torch.arange(batch, device=rng.device)[:, None] + first
    zero = torch.zeros_like(chains + blocks)
    counter = (zero + blocks, zero + (time & _WORD), zero + (chains & _WORD), zero + (chains >> 32))
    return torch.stack(philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=-1)


def _cos_sin_of_turns(words: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2π·word·2⁻³². Whole quarter turns are taken off as integers: an angle of
    several radians would be rounded by more than float64's bound allows."""
    quarter = (words + 2**29) >> 30
    rest = (words - (quarter << 30)).double() * (2 * math.pi * 2.0**-32)
    c, s = rest.cos(), rest.sin()
    odd = quarter % 2 == 1
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    return (
        torch.where((quarter + 1) & 2 > 0, -cosine, cosine),
        torch.where(quarter & 2 > 0, -sine, sine),
    )


def normal(
    shape: Sequence[int],
    rng: Tensor,
    *,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals by Box-Muller from :func:`noise_words`, evaluated in float64.

    Dimension 0 counts the chains; elements are counted row-major within a chain.
    """
    batch, per_chain = shape[0], math.prod(shape[1:])
    words = noise_words(batch, per_chain, rng, step=step)
    radius = torch.sqrt(-2 * torch.log((words[..., 0::2].double() + 0.5) * 2.0**-32))
    cosine, sine = _cos_sin_of_turns(words[..., 1::2])
    lanes = torch.stack((radius * cosine, radius * sine), dim=-1)
    return flat(lanes)[:, :per_chain].reshape(tuple(shape)).to(dtype)


def uniform(
    shape: Sequence[int],
    rng: Tensor,
    *,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniforms in the open interval (0, 1): (word + ½)·2⁻³² in float64.

    Other dtypes use the word's top 23 bits, (word div 2⁹ + ½)·2⁻²³, exact in float32.
    """
    batch, per_chain = shape[0], math.prod(shape[1:])
    words = noise_words(batch, per_chain, rng, step=step)
    words = flat(words)[:, :per_chain].reshape(tuple(shape))
    if dtype == torch.float64:
        return (words.double() + 0.5) * 2.0**-32
    return (((words >> 9).double() + 0.5) * 2.0**-23).to(dtype)


def _per_chain(value: Coefficient, step: int, x: Tensor) -> Coefficient:
    """Row ``step`` of a (T or 1, B or 1) table, shaped to broadcast against x."""
    if isinstance(value, (int, float)):
        return value
    return per_chain_view(table_row(value, step).to(arithmetic_dtype(x.dtype)), x)


def _noise_like(x: Tensor, rng: Tensor, step: int, xi: Tensor | None) -> Tensor:
    if xi is not None:
        return xi
    noise = normal(x.shape, rng, step=step, dtype=torch.float64)
    return noise.to(arithmetic_dtype(x.dtype))


def clip_gradient(
    grad: Tensor, *, grad_clip: float | None = None, grad_norm: float | None = None
) -> Tensor:
    """Elementwise to ±grad_clip, then each chain scaled to L2 norm ≤ grad_norm."""
    if grad_clip is not None:
        grad = grad.clamp(-grad_clip, grad_clip)
    if grad_norm is not None:
        grad = grad * per_chain_view(norm_scale([flat(grad)], grad_norm), grad)
    return grad


def langevin_step(
    x: Tensor,
    grad: Tensor,
    rng: Tensor,
    *,
    drift: Coefficient,
    noise: Coefficient = 0.0,
    decay: Coefficient = 0.0,
    pull: Coefficient = 0.0,
    x_ref: Tensor | None = None,
    is_score: bool = False,
    grad_clip: float | None = None,
    grad_norm: float | None = None,
    step_clip: float | None = None,
    clamp: tuple[float, float] | None = None,
    noise_when: int = 0,
    step: int = 0,
    xi: Tensor | None = None,
) -> Tensor:
    """One Langevin update of every chain; the arguments are those of ``ops.langevin_step``."""
    work = arithmetic_dtype(x.dtype)
    state, g = x.to(work), grad.to(work)
    g = clip_gradient(-g if is_score else g, grad_clip=grad_clip, grad_norm=grad_norm)
    d = _per_chain(drift, step, x) * g + _per_chain(decay, step, x) * state
    if x_ref is not None:
        d = d + _per_chain(pull, step, x) * (state - x_ref.to(work))
    if step_clip is not None:
        d = d.clamp(-step_clip, step_clip)
    out = state - d
    if noise_when == 0:
        out = out + _per_chain(noise, step, x) * _noise_like(x, rng, step, xi)
    if clamp is not None:
        out = out.clamp(*clamp)
    if noise_when == 1:
        later = step + 1
        out = out + _per_chain(noise, later, x) * _noise_like(x, rng, later, xi)
    return out.to(x.dtype)


def langevin_chain(
    x0: Tensor,
    rng: Tensor,
    energy: Callable[[Tensor], Tensor],
    *,
    n_steps: int,
    drift: Coefficient,
    clamp: tuple[float, float] | None = None,
    clamp_end: bool = False,
    negative_energy: bool = False,
    step: int = 0,
    xi: Tensor | None = None,
    thin: int | None = None,
    freeze_nonfinite: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x, trajectory or None, frozen_at) of whole chains of any energy, U or f = −U; the arguments
    are those of the ops of whole chains, ``ops.analytic_langevin_chain`` and its like."""
    x = x0.detach()
    frozen_at = torch.full((x.shape[0],), step + n_steps, device=x.device)
    kept = []
    for k in range(n_steps):
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        moved = langevin_step(
            x,
            grad,
            rng,
            drift=drift,
            clamp=None if clamp_end and k + 1 < n_steps else clamp,
            is_score=negative_energy,
            step=step + k,
            xi=None if xi is None else xi[k],
            **options,
        )
        if freeze_nonfinite:
            stops = ~flat(grad).isfinite().all(1)
            frozen_at[stops] = frozen_at[stops].clamp(max=step + k)
            moved = torch.where(per_chain_view(frozen_at <= step + k, x), x, moved)
        x = moved
        if thin is not None and (k + 1) % thin == 0:
            kept.append(x)
    if thin is None:
        return x, None, frozen_at
    return x, torch.stack(kept) if kept else x.new_empty(0, *x.shape), frozen_at


def mala_chain(
    x0: Tensor,
    rng: Tensor,
    accept_rng: Tensor,
    energy: Callable[[Tensor], Tensor],
    *,
    n_steps: int,
    step_size: Coefficient,
    temperature: float = 1.0,
    adapt_steps: int = 0,
    target_accept: float = 0.574,
    negative_energy: bool = False,
    step: int = 0,
    xi: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(states after each step (T, B, D), statistics (T, B, 5), last step sizes (B,)) of whole
    chains by the Metropolis-adjusted Langevin algorithm, of any energy, U or f = −U; the arguments
    are those of ``ops.analytic_mala_chain`` and its like."""
    sign = -1.0 if negative_energy else 1.0

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            u = sign * energy(leaf)
            (grad,) = torch.autograd.grad(u.sum(), leaf)
        return u.detach(), grad

    def delta_at(k: int) -> Tensor:
        row = table_row(step_size, k) if isinstance(step_size, Tensor) else step_size
        return torch.as_tensor(row, dtype=x0.dtype, device=x0.device).expand(len(x0))

    x, (u, grad) = x0, evaluate(x0)
    delta = delta_at(step)
    log_delta = delta.log()
    logs: list[Tensor] = []
    states: list[Tensor] = []
    rows: list[Tensor] = []
    for k in range(n_steps):
        delta = delta if adapt_steps else delta_at(step + k)
        drift, noise = delta[:, None].square() / 2, delta[:, None] * temperature**0.5
        y = x - drift * grad + noise * _noise_like(x, rng, step + k, None if xi is None else xi[k])
        u_y, grad_y = evaluate(y)
        forward = (y - x + drift * grad).square().sum(1)
        backward = (x - y + drift * grad_y).square().sum(1)
        log_ratio = (u - u_y + (forward - backward) / (2 * delta.square())) / temperature
        finite = u_y.isfinite() & grad_y.isfinite().all(1)
        acceptance = torch.where(finite, log_ratio.clamp(max=0).exp().nan_to_num(0), 0.0)
        accepted = uniform((len(x),), accept_rng, step=step + k) < acceptance
        x = torch.where(accepted[:, None], y, x)
        grad = torch.where(accepted[:, None], grad_y, grad)
        u = torch.where(accepted, u_y, u)
        rows.append(
            torch.stack([u, grad.square().sum(1), acceptance, accepted.to(u), delta], dim=1)
        )
        states.append(x)
        if k < adapt_steps:
            log_delta = log_delta + (acceptance - target_accept) * (k + 1) ** -0.6
            logs += [log_delta] if 2 * k + 1 >= adapt_steps else []
            delta = (torch.stack(logs).mean(0) if k + 1 == adapt_steps else log_delta).exp()
    if not n_steps:
        return x0.new_empty(0, *x0.shape), x0.new_empty(0, len(x0), 5), delta
    return torch.stack(states), torch.stack(rows), delta


def langevin_noise(
    x: Tensor,
    rng: Tensor,
    *,
    noise: Coefficient,
    step: int = 0,
    xi: Tensor | None = None,
) -> Tensor:
    """x + s·ξ: the noise of one step alone."""
    work = arithmetic_dtype(x.dtype)
    z = _noise_like(x, rng, step, xi).to(work)
    return (x.to(work) + _per_chain(noise, step, x) * z).to(x.dtype)


def langevin_statistics(
    x: Tensor,
    grad: Tensor,
    x_out: Tensor,
    *,
    drift: Coefficient,
    decay: Coefficient = 0.0,
    grad_clip: float | None = None,
    step_clip: float | None = None,
    clamp: tuple[float, float] | None = None,
    x_unclamped: Tensor | None = None,
    step: int = 0,
) -> Tensor:
    """The five sums (B, 5) that ``ops.langevin_step_`` writes into ``stats``.

    Σg²; Σ(x_out − x)²; elements changed by grad_clip or step_clip; elements changed by the clamp
    (of ``x_unclamped``); non-finite elements of the gradient.
    """
    g = grad.to(arithmetic_dtype(x.dtype))
    clipped = torch.zeros_like(g, dtype=torch.bool)
    d = _per_chain(drift, step, x) * clip_gradient(g, grad_clip=grad_clip)
    d = d + _per_chain(decay, step, x) * x.to(g.dtype)
    if grad_clip is not None:
        clipped |= g.abs() > grad_clip
    if step_clip is not None:
        clipped |= d.abs() > step_clip
    clamped = torch.zeros_like(clipped)
    if clamp is not None and x_unclamped is not None:
        clamped = (x_unclamped < clamp[0]) | (x_unclamped > clamp[1])
    columns = (
        g.square(),
        (x_out.to(g.dtype) - x.to(g.dtype)).square(),
        clipped.to(g.dtype),
        clamped.to(g.dtype),
        (~grad.isfinite()).to(g.dtype),
    )
    return torch.stack([flat(c).sum(1) for c in columns], dim=1)


def _activation(name: str, **parameters: float) -> Callable[[Tensor], Tensor]:
    """An activation of ``ops.mlp_langevin_chain`` and its parameters, as torch has it."""
    functions: dict[str, Callable[..., Tensor]] = {
        "silu": functional.silu,
        "relu": functional.relu,
        "leaky_relu": functional.leaky_relu,  # negative_slope
        "elu": functional.elu,  # alpha
        "tanh": torch.tanh,
        "softplus": functional.softplus,  # beta, threshold
        "gelu": functional.gelu,
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    }
    return partial(functions[name], **parameters)


def _to_bfloat16(x: Tensor) -> Tensor:
    """Rounded to bfloat16, in x's dtype; with the derivative of the identity."""
    return x + (x.detach().bfloat16().to(x.dtype) - x.detach())


def mlp_energy(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str,
    activation_args: Mapping[str, float] | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """U(x) of Linear - activation - … - Linear(·, 1), (B,); weights (out, in).

    bfloat16: factors of the products between hidden layers, also of those of U's gradient, are
    rounded to it.
    """
    act = _activation(activation, **(activation_args or {}))
    h = x
    for layer, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        if bfloat16 and layer > 0:
            h = functional.linear(_to_bfloat16(h), _to_bfloat16(weight), bias)
            if h.requires_grad:
                h.register_hook(_to_bfloat16)
        else:
            h = functional.linear(h, weight, bias)
        h = act(h)
    return functional.linear(h, weights[-1], biases[-1]).squeeze(1)


def mlp_langevin_chain(
    x0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rng: Tensor,
    *,
    activation: str,
    activation_args: Mapping[str, float] | None = None,
    bfloat16: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """:func:`langevin_chain` of :func:`mlp_energy`."""

    def energy(x: Tensor) -> Tensor:
        return mlp_energy(
            x, weights, biases, activation=activation, activation_args=activation_args,
            bfloat16=bfloat16,
        )  # fmt: skip

    return langevin_chain(x0, rng, energy, **options)


def affine_coupling(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """y = x·e^a + b, ladj = Σa; params (B, 2, *x.shape[1:]) = (a, b)."""
    work = arithmetic_dtype(x.dtype)
    a, b = params.to(work).unbind(1)
    return (x.to(work) * a.exp() + b).to(x.dtype), flat(a).sum(1)


def affine_coupling_inverse(y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """x = (y − b)·e^{−a}, ladj = −Σa."""
    work = arithmetic_dtype(y.dtype)
    a, b = params.to(work).unbind(1)
    return ((y.to(work) - b) * (-a).exp()).to(y.dtype), -flat(a).sum(1)


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
    """dropout(softmax(scale·q·kᵀ))·v over (B, H, L, d); scale is d^{−1/2} where None is given.

    Of the weights (B, H, L, L) those are kept, and divided by 1 − p, whose uniforms are ≥ p.
    """
    work = arithmetic_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (q.to(work) @ k.to(work).transpose(-1, -2) * scale).softmax(-1)
    kept = uniform(weights.shape, rng, step=step) >= p
    return (weights * (kept.to(work) / (1 - p)) @ v.to(work)).to(q.dtype)


def concat_elu(x: Tensor, rng: Tensor | None = None, p: float = 0.0, *, step: int = 0) -> Tensor:
    """elu of (x, −x) over (B, C, …), twice the channels.

    With rng and p > 0 those channels of each chain are kept, and divided by 1 − p, whose uniforms
    (B, 2C) are ≥ p.
    """
    y = functional.elu(torch.cat((x, -x), dim=1).to(arithmetic_dtype(x.dtype)))
    return (y * _channel_factors(y, rng, p, step)).to(x.dtype)


def concat_elu_gradient(
    grad_y: Tensor, y: Tensor, rng: Tensor | None = None, p: float = 0.0, *, step: int = 0
) -> Tensor:
    """The gradient of x, from that of y = concat_elu(x, …) and y itself."""
    work = arithmetic_dtype(y.dtype)
    factors = _channel_factors(y.to(work), rng, p, step)
    slope = torch.where(y > 0, factors, y.to(work) + factors)
    plus, minus = (grad_y.to(work) * slope).chunk(2, dim=1)
    return (plus - minus).to(y.dtype)


def _channel_factors(y: Tensor, rng: Tensor | None, p: float, step: int) -> Tensor:
    """1/(1 − p) for each channel of y (B, C, …) that is kept, 0 for the others."""
    if rng is None or p == 0:
        return y.new_ones(())
    kept = uniform(y.shape[:2], rng, step=step) >= p
    return (kept.to(y.dtype) / (1 - p)).reshape(kept.shape + (1,) * (y.ndim - 2))


def gate_add_norm(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over the last dimension of x + a·σ(b), x (..., C) and gates (a, b) (..., 2C)."""
    work = arithmetic_dtype(x.dtype)
    a, b = gates.to(work).chunk(2, -1)
    sums = x.to(work) + a * torch.sigmoid(b)
    centred = sums - sums.mean(-1, keepdim=True)
    normalized = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normalized * weight.to(work) + bias.to(work)).to(x.dtype)


def weight_norm(directions: Sequence[Tensor], gains: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """g·v/‖v‖ for every row of each layer, v (rows, …) and g (rows, 1, …)."""

    def normed(v: Tensor, g: Tensor) -> Tensor:
        wide = v.to(arithmetic_dtype(v.dtype))
        norm = per_chain_view(flat(wide).square().sum(1).sqrt(), v)
        return (wide * (g.to(wide.dtype) / norm)).to(v.dtype)

    return tuple(normed(v, g) for v, g in zip(directions, gains, strict=True))


MIN_LOG_SCALE = -7.0
LEGACY_LOGIT_LIMIT = math.log((1 - 1e-5) / 1e-5)


def _mixture_parameters(
    params: Tensor, *, affine: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(a, b, (log-weights, means, log-scales)) of params (B, 2 + 3K or 3K, …)."""
    head, mixture = (params[:, :2], params[:, 2:]) if affine else (None, params)
    if mixture.shape[1] == 0 or mixture.shape[1] % 3:
        raise ValueError(
            f"params must have {'2 + ' if affine else ''}3K entries in dimension 1, K ≥ 1, "
            f"got {params.shape[1]}"
        )
    logits, means, log_scales = mixture.chunk(3, dim=1)
    zero = torch.zeros_like(means[:, 0])
    a, b = (zero, zero) if head is None else head.unbind(1)
    return a, b, (logits.log_softmax(1), means, log_scales.clamp(min=MIN_LOG_SCALE))


def mixture_logistic_log_cdf(
    x: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log F(x), log(1 − F(x)) and log f(x) of a mixture of logistics; components in dimension 1."""
    t = (x.unsqueeze(1) - means) * (-log_scales).exp()
    below, above = functional.logsigmoid(t), functional.logsigmoid(-t)
    log_cdf = (log_weights + below).logsumexp(1)
    log_survival = (log_weights + above).logsumexp(1)
    log_density = (log_weights + below + above - log_scales).logsumexp(1)
    return log_cdf, log_survival, log_density


def mixture_logistic_coupling(
    x: Tensor, params: Tensor, *, affine: bool = True
) -> tuple[Tensor, Tensor]:
    """y = (logit F(x) + b)·e^a with F the CDF of a mixture of K logistics (Ho et al. 2019).

    params (B, 2 + 3K, *x.shape[1:]) = a, b, K weight logits, K means, K log-scales (clamped at −7);
    without ``affine`` (B, 3K, …). ladj = Σ[log f − log F − log(1 − F) + a], (B,).
    """
    work = arithmetic_dtype(x.dtype)
    a, b, mixture = _mixture_parameters(params.to(work), affine=affine)
    log_cdf, log_survival, log_density = mixture_logistic_log_cdf(x.to(work), *mixture)
    y = (log_cdf - log_survival + b) * a.exp()
    ladj = log_density - log_cdf - log_survival + a
    return y.to(x.dtype), flat(ladj).sum(1)


@torch.no_grad()
def mixture_logistic_quantile(
    v: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor, *, tolerance: float = 1e-10
) -> Tensor:
    """x with logit F(x) = v by the published batch-wide bisection, at most 100 iterations.

    Its bracket is [min(μ − r), max(μ + r)], r = 20·Σ_k e^{s_k} (more where |v| > 20); it stops
    when no element of the batch moves by more than ``tolerance``.
    """
    reach = v.abs().clamp(min=20) * log_scales.exp().sum(1)
    low = (means - reach.unsqueeze(1)).amin(1)
    high = (means + reach.unsqueeze(1)).amax(1)
    x = torch.zeros_like(v)
    for _ in range(100):
        log_cdf, log_survival, _ = mixture_logistic_log_cdf(x, log_weights, means, log_scales)
        too_high = log_cdf - log_survival > v
        high = torch.where(too_high, x, high)
        low = torch.where(too_high, low, x)
        middle = torch.where(too_high, x + low, x + high) / 2
        moved = (middle - x).abs().max() if x.numel() else x.new_zeros(())
        x = middle
        if moved <= tolerance:
            break
    return x


def mixture_logistic_coupling_inverse(
    y: Tensor, params: Tensor, *, affine: bool = True, legacy_cdf_clamp: bool = False
) -> tuple[Tensor, Tensor]:
    """x with logit F(x) = v = y·e^{−a} − b; ladj = −Σ[log f(x) − log σ(v) − log σ(−v) + a].

    Differentiable once, by the implicit function theorem: the gradient is that of a Newton step
    from the root with its slope held constant. ``legacy_cdf_clamp`` clamps the CDF value to
    [1e-5, 1 − 1e-5] for root finding only, as the published code does; v in the log-determinant
    stays as it is.
    """
    work = arithmetic_dtype(y.dtype)
    a, b, mixture = _mixture_parameters(params.to(work), affine=affine)
    v = y.to(work) * (-a).exp() - b
    target = v.clamp(-LEGACY_LOGIT_LIMIT, LEGACY_LOGIT_LIMIT) if legacy_cdf_clamp else v
    root = mixture_logistic_quantile(target, *mixture)
    log_cdf, log_survival, log_density = mixture_logistic_log_cdf(root, *mixture)
    log_slope = log_density - log_cdf - log_survival
    newton = (target - (log_cdf - log_survival)) * (-log_slope.detach()).exp()
    x = root + (newton - newton.detach())
    _, _, log_density = mixture_logistic_log_cdf(x, *mixture)
    log_sigmoids = functional.logsigmoid(v) + functional.logsigmoid(-v)
    ladj = log_sigmoids - log_density - a
    return x.to(y.dtype), flat(ladj).sum(1)
