"""The operators, with checked arguments, fake kernels (torch.compile) and derivatives.

Each says what it equals in plain PyTorch; :mod:`coopflow_ext.reference` holds that in full.
The kernels check their arguments and the functions here raise what they find as ValueError, or as
TypeError when it is a dtype or a type; nothing is changed when an op refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coopflow_ext import _autograd
from coopflow_ext._extension import native
from coopflow_ext.errors import BuildError

__all__ = [
    "affine_coupling",
    "affine_coupling_inverse",
    "langevin_noise_",
    "langevin_step",
    "langevin_step_",
    "mixture_logistic_coupling",
    "mixture_logistic_coupling_inverse",
    "normal",
    "uniform",
]

Coefficient = float | Tensor
_HALF = (torch.bfloat16, torch.float16)
_ZERO_BY_DEFAULT = frozenset(
    {"drift", "noise", "decay", "pull", "noise_when", "step", "chain_offset"}
)


class _Missing:
    """Stands for the operators when the library is missing: importing works, using raises."""

    def __getattr__(self, name: str) -> Any:
        return getattr(native(), name)


_coopflow: Any
try:
    _coopflow = native()
except BuildError:
    _coopflow = _Missing()
else:
    _autograd.register()


def _argument_error(error: RuntimeError) -> Exception:
    """What a kernel's own check found, as ValueError or TypeError; other errors as they are."""
    message = str(error).splitlines()[0]
    if message.startswith(("Could not run 'coopflow::", "unsupported memory format")):
        return ValueError(
            "tensors must be dense and on a device that the library has code for (see `coopflow "
            f"info`): {message.partition('. ')[0]}"
        )
    if not message.startswith("coopflow::"):
        return error
    if "type 'int'" in message and message.endswith("found type 'int'."):
        return ValueError(message.replace("found type 'int'", "found one beyond 64 bits"))
    is_type = any(sign in message for sign in ("dtype", "must be a tensor", "Expected a value"))
    return (TypeError if is_type else ValueError)(message)


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that differ from the schemas' defaults None, False and 0, and so have to pass
    the dispatcher, where every one costs time; a table of a coefficient under ``name_t``."""
    given = {}
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        if name not in _ZERO_BY_DEFAULT:
            given[name] = value
        elif isinstance(value, Tensor):
            given[f"{name}_t"] = value
        elif not isinstance(value, (int, float)) or value != 0:  # what is no number is refused
            given[name] = value
    return given


def _refuse_none(op: str, **coefficients: Coefficient | None) -> None:
    for name, value in coefficients.items():
        if value is None:
            raise TypeError(f"{op}: {name} must be a float or a tensor, got None")


def _bounds(op: str, clamp: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        raise ValueError(f"{op}: clamp must be (low, high), got {clamp!r}")
    low, high = clamp
    return low, high


def _new_draw(op: str, shape: Sequence[int], rng: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(rng, Tensor):
        raise TypeError(f"{op}: rng must be a tensor (see Key.tensor), got {type(rng).__name__}")
    if not isinstance(shape, Sequence):
        raise TypeError(f"{op}: shape must be a sequence of ints, got {type(shape).__name__}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype must be a torch.dtype, got {type(dtype).__name__} {dtype!r}")
    if any(n < 0 for n in shape):
        raise ValueError(f"{op}: shape must not hold negative sizes, got {tuple(shape)}")
    return torch.empty(tuple(shape), dtype=dtype, device=rng.device)


def _refuse_autograd(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, but an in-place op has no derivative; call it under "
                f"torch.no_grad(), detach {name}, or use ops.langevin_step"
            )


def _refuse_negated(op: str, x: Tensor) -> None:
    if isinstance(x, Tensor) and not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(
            f"{op}: x is a lazily negated view, which cannot be written in place; give "
            "x.resolve_neg()"
        )


def langevin_step_(
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
    chain_offset: int = 0,
    xi: Tensor | None = None,
    x_low: Tensor | None = None,
    stats: Tensor | None = None,
    active: Tensor | None = None,
    freeze_nonfinite: bool = False,
    frozen_at: Tensor | None = None,
) -> Tensor:
    """One Langevin update of every chain, in place.

    Equivalent to::

        g = -grad if is_score else grad
        g = g.clamp(-grad_clip, grad_clip)            # if given
        g = g * min(1, grad_norm / ‖g‖)               # per chain, if given
        d = drift * g + decay * x + pull * (x - x_ref)
        x -= d.clamp(-step_clip, step_clip)
        x += noise * normal(x.shape, rng, step=step, chain_offset=chain_offset)
        x.clamp_(*clamp)

    Args:
        x: state (B, …), float32, float64, bfloat16 or float16 (arithmetic in float32, float64 for
            double); any dense layout whose outermost storage dimension is the batch.
        grad: gradient of the energy, or the score with ``is_score``; dtype and strides of x.
        rng: int64[2] = (seed, time) on x's device, see :meth:`Key.tensor`; never changed.
        drift, noise, decay, pull: floats, or tables (T or 1, B or 1), float32 or float64, of which
            row ``step`` is used (the only row when T is 1).
        x_ref: reference of the pull, like x.
        grad_clip, grad_norm, step_clip: limits, > 0.
        clamp: (low, high).
        noise_when: 0 as above; 1: the noise (and its row) of step + 1 is added after the clamp and
            is not clamped, for loops that put noise before the gradient; 2: none.
        step: added to the key's time, with which it must stay below 2³² (:meth:`Key.advance` tells;
            the op does not read rng on the host); also the row of tables.
        chain_offset: global index of chain 0.
        xi: standard normals in place of the key's, like x.
        x_low: bfloat16 or float16 copy of the new state, written too.
        stats: (B, 5) float32 (float64 for double), overwritten: Σg² of the raw gradient;
            Σ(x_out − x_in)² without noise of the next step; elements changed by grad_clip or
            step_clip; elements changed by the clamp; non-finite elements of the gradient.
        active: (B,) bool; chains where it is false keep their state.
        freeze_nonfinite: first clear ``active`` where a chain's gradient is not finite.
        frozen_at: (B,) int64; is given ``step`` where freeze_nonfinite clears ``active``.

    Returns:
        x.

    Raises:
        ValueError, TypeError: an argument does not fit; x is unchanged then.
    """
    if torch.is_grad_enabled():
        _refuse_autograd("langevin_step_", x=x, grad=grad)
    _refuse_negated("langevin_step_", x)
    if drift is None or noise is None or decay is None or pull is None:
        _refuse_none("langevin_step_", drift=drift, noise=noise, decay=decay, pull=pull)
    low, high = (None, None) if clamp is None else _bounds("langevin_step_", clamp)
    try:
        _coopflow.langevin_step_(
            x,
            grad,
            rng,
            **_given(
                drift=drift,
                noise=noise,
                decay=decay,
                pull=pull,
                x_ref=x_ref,
                is_score=is_score,
                grad_clip=grad_clip,
                grad_norm=grad_norm,
                step_clip=step_clip,
                clamp_low=low,
                clamp_high=high,
                noise_when=noise_when,
                step=step,
                chain_offset=chain_offset,
                xi=xi,
                x_low=x_low,
                stats=stats,
                active=active,
                freeze_nonfinite=freeze_nonfinite,
                frozen_at=frozen_at,
            ),
        )
    except RuntimeError as error:
        raise _argument_error(error) from None
    torch.autograd.graph.increment_version(x)
    return x


def langevin_noise_(
    x: Tensor,
    rng: Tensor,
    *,
    noise: Coefficient,
    step: int = 0,
    chain_offset: int = 0,
    xi: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Adds the noise of one step alone, in place: the first step of loops with ``noise_when=1``.

    Equivalent to ``x += noise * normal(x.shape, rng, step=step, chain_offset=chain_offset)``;
    the arguments are those of :func:`langevin_step_`.
    """
    if torch.is_grad_enabled():
        _refuse_autograd("langevin_noise_", x=x)
    _refuse_negated("langevin_noise_", x)
    if noise is None:
        _refuse_none("langevin_noise_", noise=noise)
    try:
        _coopflow.langevin_noise_(
            x,
            rng,
            **_given(noise=noise, step=step, chain_offset=chain_offset, xi=xi, active=active),
        )
    except RuntimeError as error:
        raise _argument_error(error) from None
    torch.autograd.graph.increment_version(x)
    return x


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
    chain_offset: int = 0,
    xi: Tensor | None = None,
) -> Tensor:
    """One Langevin update of every chain, as a function of x and grad, differentiable twice.

    Equivalent to :func:`langevin_step_` on a clone of x; the arguments are its. Clips and clamp
    pass gradients where they change nothing; the norm clip has its full Jacobian
    (m/‖g‖)(I − ĝĝᵀ). Coefficient tables, x_ref, rng and xi are constants: a ValueError names one
    that requires grad.
    """
    if torch.is_grad_enabled():
        constants = {"x_ref": x_ref, "xi": xi}
        for name, value in {"drift": drift, "noise": noise, "decay": decay, "pull": pull}.items():
            constants[name] = value if isinstance(value, Tensor) else None
        for name, tensor in constants.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"langevin_step: {name} is a constant of the derivative; detach it"
                )
    low, high = (None, None) if clamp is None else _bounds("langevin_step", clamp)
    coefficients: dict[str, Any] = {}
    for name, value in {"drift": drift, "noise": noise, "decay": decay, "pull": pull}.items():
        table = isinstance(value, Tensor)
        coefficients |= (
            {name: 0.0, f"{name}_t": value} if table else {name: value, f"{name}_t": None}
        )
    options = _autograd.LangevinOptions(
        **coefficients,
        x_ref=x_ref,
        is_score=is_score,
        grad_clip=grad_clip,
        grad_norm=grad_norm,
        step_clip=step_clip,
        clamp_low=low,
        clamp_high=high,
        noise_when=noise_when,
        step=step,
        chain_offset=chain_offset,
        xi=xi,
    )
    try:
        out: Tensor = _autograd.apply(_autograd.LangevinStep, x, grad, rng, *options)
    except RuntimeError as error:
        raise _argument_error(error) from None
    return out


def normal(
    shape: Sequence[int],
    rng: Tensor,
    *,
    step: int = 0,
    chain_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals of the given shape on rng's device; dimension 0 counts the chains.

    A pure function of (seed, chain, time + step, element): the words are the same on every device
    and for every dtype; elements are counted in storage order within a chain.

    Equivalent to :func:`coopflow_ext.reference.normal`.
    """
    if torch.compiler.is_compiling():
        drawn: Tensor = _traced_draw("normal", list(shape), rng, step, chain_offset, dtype)
        return drawn
    return _draw("normal", shape, rng, step, chain_offset, dtype)


def uniform(
    shape: Sequence[int],
    rng: Tensor,
    *,
    step: int = 0,
    chain_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniforms in the open interval (0, 1) from the words behind :func:`normal`.

    float64 uses all 32 bits of a word; float32 and below its top 23 (half-precision dtypes round
    the float32 value, which can give 0 or 1 exactly).

    Equivalent to :func:`coopflow_ext.reference.uniform`.
    """
    if torch.compiler.is_compiling():
        drawn: Tensor = _traced_draw("uniform", list(shape), rng, step, chain_offset, dtype)
        return drawn
    return _draw("uniform", shape, rng, step, chain_offset, dtype)


def _draw(
    op: str, shape: Sequence[int], rng: Tensor, step: int, chain_offset: int, dtype: torch.dtype
) -> Tensor:
    out = _new_draw(op, shape, rng, dtype)
    try:
        getattr(_coopflow, f"{op}_")(out, rng, step=step, chain_offset=chain_offset)
    except RuntimeError as error:
        raise _argument_error(error) from None
    return out


@torch.library.custom_op(
    "coopflow_ext::draw",
    mutates_args=(),
    schema="(str op, SymInt[] shape, Tensor rng, SymInt step, SymInt chain_offset, "
    "ScalarType dtype) -> Tensor",
)
def _traced_draw(
    op: str, shape: Sequence[int], rng: Tensor, step: int, chain_offset: int, dtype: torch.dtype
) -> Tensor:
    """A draw that mutates nothing, for torch.compile: it moved the filling of a new tensor behind
    the tensor's uses (seen in 2.13, in a graph with gradients)."""
    return _draw(op, shape, rng, step, chain_offset, dtype)


@_traced_draw.register_fake
def _(
    op: str, shape: Sequence[int], rng: Tensor, step: int, chain_offset: int, dtype: torch.dtype
) -> Tensor:
    return _new_draw(op, shape, rng, dtype)


def _coupling(
    function: type[torch.autograd.Function],
    name: str,
    state: Tensor,
    params: Tensor,
    *options: bool,
) -> tuple[Tensor, Tensor]:
    """(changed state, ladj) of a coupling, from tensors of any layout."""
    for argument, value in ((name, state), ("params", params)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    try:
        out, ladj = _autograd.apply(function, state.contiguous(), params.contiguous(), *options)
    except RuntimeError as error:
        raise _argument_error(error) from None
    return out, ladj


def affine_coupling(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """The affine coupling y = x·e^a + b and its log|det|.

    Equivalent to::

        a, b = params.unbind(1)
        return x * a.exp() + b, a.flatten(1).sum(1)

    Args:
        x: (B, …), floating.
        params: (B, 2, …) = (a, b), of x's dtype, or half-precision beside a float32 x; a arrives
            bounded.

    Returns:
        y of x's dtype, and ladj (B,), float32 (float64 for double), summed in a fixed order.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return _coupling(_autograd.AffineCoupling, "x", x, params)


def affine_coupling_inverse(y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`affine_coupling`, and the log|det| of the inverse map.

    Equivalent to::

        a, b = params.unbind(1)
        return (y - b) * (-a).exp(), -a.flatten(1).sum(1)
    """
    return _coupling(_autograd.AffineCouplingInverse, "y", y, params)


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
    return _coupling(_autograd.MixtureLogisticCoupling, "x", x, params, affine)


def mixture_logistic_coupling_inverse(
    y: Tensor, params: Tensor, *, affine: bool = True, legacy_cdf_clamp: bool = False
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`mixture_logistic_coupling`, and the log|det| of the inverse map.

    Solves logit F(x) = v = y·e^{−a} − b by Newton's method inside an exact bracket, to 4 units in
    the last place of max(1, |v|) or 2 of x. Differentiable in y and params by the implicit function
    theorem. Where the density all but vanishes between components, x is not determined by v and
    derivatives are large but finite.

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
    function, options = _autograd.MixtureLogisticCouplingInverse, (affine, legacy_cdf_clamp)
    tensors = isinstance(y, Tensor) and isinstance(params, Tensor)
    if torch.is_grad_enabled() and tensors and y.dtype == params.dtype in _HALF:
        # Derivatives are taken at the root, which x in half precision is not.
        x, ladj = _coupling(function, "y", y.float(), params, *options)
        return x.to(y.dtype), ladj
    return _coupling(function, "y", y, params, *options)
