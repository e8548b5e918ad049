"""The Langevin update of every chain: in place, as a function, and its noise alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coopflow_ext import reference
from coopflow_ext._tensors import arithmetic_dtype
from coopflow_ext.ops import _call

Coefficient = float | Tensor
_ZERO_BY_DEFAULT = frozenset(
    {"drift", "noise", "decay", "pull", "noise_when", "step", "chain_offset"}
)


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
        _call.coopflow.langevin_step_(
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
        raise _call.argument_error(error) from None
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
        _call.coopflow.langevin_noise_(
            x,
            rng,
            **_given(noise=noise, step=step, chain_offset=chain_offset, xi=xi, active=active),
        )
    except RuntimeError as error:
        raise _call.argument_error(error) from None
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
    options = _Options(
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
        out: Tensor = _call.apply(_LangevinStep, x, grad, rng, *options)
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    return out


class _Options(NamedTuple):
    """The arguments of the raw functional op after (x, grad, rng), in the schema's order."""

    drift: float
    drift_t: Tensor | None
    noise: float
    noise_t: Tensor | None
    decay: float
    decay_t: Tensor | None
    pull: float
    pull_t: Tensor | None
    x_ref: Tensor | None
    is_score: bool
    grad_clip: float | None
    grad_norm: float | None
    step_clip: float | None
    clamp_low: float | None
    clamp_high: float | None
    noise_when: int
    step: int
    chain_offset: int
    xi: Tensor | None


def _bounds_of(o: _Options) -> tuple[float, float] | None:
    if o.clamp_low is None and o.clamp_high is None:
        return None
    return (
        -math.inf if o.clamp_low is None else o.clamp_low,
        math.inf if o.clamp_high is None else o.clamp_high,
    )


def _noise_before_clamp(x: Tensor, rng: Tensor, o: _Options) -> Tensor | None:
    """The normals whose place in the clamp decides where gradients pass, if there are any."""
    if _bounds_of(o) is None or o.noise_when != 0 or (o.noise == 0 and o.noise_t is None):
        return None
    if o.xi is not None:
        return o.xi
    xi = torch.empty_like(x, dtype=arithmetic_dtype(x.dtype))
    _call.coopflow.normal_(xi, rng, step=o.step, chain_offset=o.chain_offset)
    return xi


class _LangevinStep(torch.autograd.Function):
    """(x, grad, rng, *_Options) -> x; its derivative is that of the reference."""

    @staticmethod
    def forward(x: Tensor, grad: Tensor, rng: Tensor, *options: Any) -> Tensor:
        result: Tensor = _call.coopflow.langevin_step(x, grad, rng, *options)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*tensors)
        ctx.values = [None if isinstance(value, Tensor) else value for value in inputs]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, grad, rng, *options = (
            value if tensor is None else tensor
            for tensor, value in zip(ctx.saved_tensors, ctx.values, strict=True)
        )
        o = _Options(*options)
        with torch.no_grad():
            xi = _noise_before_clamp(x, rng, o)

        def step(x: Tensor, grad: Tensor) -> Tensor:
            return reference.langevin_step(
                x,
                grad,
                rng,
                drift=o.drift if o.drift_t is None else o.drift_t,
                noise=0.0 if xi is None else o.noise if o.noise_t is None else o.noise_t,
                decay=o.decay if o.decay_t is None else o.decay_t,
                pull=o.pull if o.pull_t is None else o.pull_t,
                x_ref=o.x_ref,
                is_score=o.is_score,
                grad_clip=o.grad_clip,
                grad_norm=o.grad_norm,
                step_clip=o.step_clip,
                clamp=_bounds_of(o),
                noise_when=2 if xi is None else 0,
                step=o.step,
                xi=xi,
            )

        gradients: tuple[Tensor, Tensor] = torch.func.vjp(step, x, grad)[1](grad_out)
        return (*gradients, None, *[None] * len(options))


_call.positional("langevin_step", _LangevinStep)
_call.register_autograd("langevin_step", _LangevinStep)
_call.register_fake("langevin_step", lambda x, *args, **kwargs: torch.empty_like(x))
_call.register_fake("langevin_step_", _call.no_result)
_call.register_fake("langevin_plain_step_", _call.no_result, on_host="numbers")
_call.register_fake("langevin_noise_", _call.no_result)
