"""The mixture-of-logistics coupling of Flow++ and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from coopflow_ext import reference
from coopflow_ext._tensors import arithmetic_dtype, per_chain_view
from coopflow_ext.ops._coupling import coupling, differentiable, inverse_vjp_of, vjp_of

_HALF = (torch.bfloat16, torch.float16)


def mixture_logistic_coupling(
    x: Tensor, params: Tensor, *, affine: bool = True
) -> tuple[Tensor, Tensor]:
    """y = (logit F(x) + b)·e^a, F the CDF of a mixture of K logistics, and its log|det|.

    Works in logit space with sums of positive terms, so that no tail saturates, and recomputes in
    the backward pass instead of keeping tensors of K components.

    Equivalent to::

        a, b = params[:, :2].unbind(1)                           # 0 without ``affine``
        logits, means, log_scales = params[:, 2:].chunk(3, dim=1)
        log_scales = log_scales.clamp(min=-7)
        t = (x.unsqueeze(1) - means) * (-log_scales).exp()
        log_w, below, above = logits.log_softmax(1), logsigmoid(t), logsigmoid(-t)
        log_cdf, log_survival = (log_w + below).logsumexp(1), (log_w + above).logsumexp(1)
        log_density = (log_w + below + above - log_scales).logsumexp(1)
        y = (log_cdf - log_survival + b) * a.exp()
        return y, (log_density - log_cdf - log_survival + a).flatten(1).sum(1)

    Source: Ho et al. 2019, Flow++, section 3.2.

    Args:
        x: (B, …), floating.
        params: (B, 2 + 3K, …) = a (bounded by the caller), b, K weight logits, K means, K
            log-scales; of x's dtype, or half-precision beside a float32 x. Log-scales below −7
            count as −7 and have no gradient.
        affine: False leaves a and b out: params (B, 3K, …).

    Returns:
        y of x's dtype, and ladj (B,), float32 (float64 for double), summed in a fixed order. An
        element whose x or any parameter is not finite, or whose logit F(x) overflows, is NaN, and
        so is its row's ladj; so are its gradients, but for 0 of a log-scale below −7.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return coupling(_MIXTURE, "x", x, params, affine)


def mixture_logistic_coupling_inverse(
    y: Tensor, params: Tensor, *, affine: bool = True, legacy_cdf_clamp: bool = False
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`mixture_logistic_coupling`, and the log|det| of the inverse map.

    Solves logit F(x) = v = y·e^{−a} − b by Newton's method inside an exact bracket: logit F of x,
    or of an x within 4 units of its last place, is v to 8·eps·max(1, |v|). Differentiable in y and
    params by the implicit function theorem. Where the density all but vanishes between components,
    x is not determined by v and derivatives are large but finite.

    Equivalent to :func:`coopflow_ext.reference.mixture_logistic_coupling_inverse`.

    Args:
        y: (B, …), floating.
        params: as for :func:`mixture_logistic_coupling`.
        affine: False leaves a and b out.
        legacy_cdf_clamp: clamp σ(v) to [1e-5, 1 − 1e-5] for root finding, but not in the
            log-determinant, as the authors' published code does.

    Returns:
        x of y's dtype, and ladj (B,). An element whose y or any parameter is not finite, or whose v
        overflows, is NaN, and so is its row's ladj; so are its gradients, but for 0 of a log-scale
        below −7.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    function, options = _MIXTURE_INVERSE, (affine, legacy_cdf_clamp)
    tensors = isinstance(y, Tensor) and isinstance(params, Tensor)
    if torch.is_grad_enabled() and tensors and y.dtype == params.dtype in _HALF:
        # Derivatives are taken at the root, which x in half precision is not.
        x, ladj = coupling(function, "y", y.float(), params, *options)
        return x.to(y.dtype), ladj
    return coupling(function, "y", y, params, *options)


def _forward(x: Tensor, params: Tensor, affine: bool) -> tuple[Tensor, Tensor]:
    return reference.mixture_logistic_coupling(x, params, affine=affine)


def _inverse_gradients(
    grad_x: Tensor,
    grad_ladj: Tensor,
    y: Tensor,
    x: Tensor,
    params: Tensor,
    affine: bool,
    legacy_cdf_clamp: bool,
) -> tuple[Tensor, Tensor]:
    """(gy, gparams) of the inverse, x its result.

    x is a function of v = y·e^{−a} − b and of the mixture: the inverse of the coupling with
    a = b = 0.
    """
    work = arithmetic_dtype(x.dtype)
    y = y.to(work)
    head, mixture = params.to(work).split(
        [2, params.shape[1] - 2] if affine else [0, params.shape[1]], dim=1
    )
    grad_v, grad_mixture = inverse_vjp_of(_forward)(grad_x, grad_ladj, x, mixture, False)
    a, b = head.unbind(1) if affine else (torch.zeros_like(y),) * 2
    scaled = y * (-a).exp()
    gl = per_chain_view(grad_ladj, y)
    if legacy_cdf_clamp:
        v = scaled - b
        clamped = v.abs() > reference.LEGACY_LOGIT_LIMIT
        grad_v = torch.where(clamped, -gl * torch.tanh(v / 2), grad_v)
    if not affine:
        return grad_v, grad_mixture
    grad_head = torch.stack((-gl - grad_v * scaled, -grad_v), dim=1)
    return grad_v * (-a).exp(), torch.cat((grad_head, grad_mixture), dim=1)


_MIXTURE = differentiable("mixture_logistic_coupling", vjp_of(_forward), saved=lambda x, y: (x,))
_MIXTURE_INVERSE = differentiable(
    "mixture_logistic_coupling_inverse", _inverse_gradients, saved=lambda y, x: (y, x)
)
