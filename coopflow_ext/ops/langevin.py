"""The Langevin update of every chain: in place, as a function, and its noise alone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coopflow_ext import reference
from coopflow_ext._recording import is_watched
from coopflow_ext._tensors import Coefficient, arithmetic_dtype, check_tensors
from coopflow_ext.ops import _call

_COEFFICIENTS = ("drift", "noise", "decay", "pull", "step_size")
_TABLES = ("drift_t", "noise_t", "decay_t", "pull_t")  # of coefficients, which may be learned
_OUTPUTS = ("x_low", "stats", "active", "freeze_nonfinite", "frozen_at")  # of the op in place


class _Options(NamedTuple):
    """What ``langevin_step`` takes after (x, grad, rng), in the schema's order."""

    drift: float = 0.0
    drift_t: Tensor | None = None
    noise: float = 0.0
    noise_t: Tensor | None = None
    decay: float = 0.0
    decay_t: Tensor | None = None
    pull: float = 0.0
    pull_t: Tensor | None = None
    x_ref: Tensor | None = None
    is_score: bool = False
    grad_clip: float | None = None
    grad_norm: float | None = None
    step_clip: float | None = None
    clamp_low: float | None = None
    clamp_high: float | None = None
    noise_when: int = 0
    step: int = 0
    xi: Tensor | None = None


# What the ops of a step and those of whole chains take for an option that is not wanted.
_OFF = {
    **_Options()._asdict(),
    **dict.fromkeys(_OUTPUTS),
    "freeze_nonfinite": False,
    "clamp_end": False,
    "negative_energy": False,
    "bfloat16": False,
    "n_steps": None,
    "thin": None,
    "step_size": 0.0,
    "temperature": 1.0,
    "adapt_steps": 0,
    "target_accept": 0.574,
}


def raw_options(op: str, **options: Any) -> dict[str, Any]:
    """The options of a face as arguments of its raw op, without those that are off: every one
    costs time in the dispatcher. A coefficient is a float or a table, under ``name_t``."""
    clamp = options.pop("clamp", None)
    raw: dict[str, Any] = {}
    for name, value in options.items():
        if name not in _OFF:
            raise TypeError(f"{op} has no option {name!r}")
        off = _OFF[name]
        # What is no number where one belongs has to reach the op, which refuses it.
        if value is off or (isinstance(value, (int, float)) and value == off):
            continue
        if name in _COEFFICIENTS:
            if value is None:
                raise TypeError(f"{op}: {name} must be a float or a tensor, got None")
            if isinstance(value, Tensor):
                name = f"{name}_t"
        raw[name] = value
    if clamp is not None:
        if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
            raise ValueError(f"{op}: clamp must be (low, high), got {clamp!r}")
        raw["clamp_low"], raw["clamp_high"] = clamp
    return raw


def refuse_derivatives(op: str, kind: str, **given: Any) -> None:
    """Of an op in place, or of a whole chain, which have none: its tensors and raw options.

    Raises:
        ValueError: a tensor requires grad. RuntimeError: one has a tangent of forward mode.
    """
    forward_mode, grad_mode = _call.in_forward_mode(), torch.is_grad_enabled()
    if not (forward_mode or grad_mode):
        return
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            continue
        name = name.removesuffix("_t")
        if forward_mode:
            refuse_tangent(f"{op}: {name}", tensor, kind)
        if grad_mode and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, but {kind} has no derivative; call it under "
                f"torch.no_grad(), detach {name}, or use ops.langevin_step"
            )


def refuse_tangent(name: str, value: object, kind: str) -> None:
    """RuntimeError for a tensor with one, of forward mode."""
    if _call.has_tangent(value):
        raise RuntimeError(f"{name} has a tangent, but {kind} has no forward derivative")


def _refuse_negated(op: str, **written: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    for name, tensor in written.items():
        if tensor.is_neg():
            raise ValueError(
                f"{op}: {name} is a lazily negated view, which cannot be written in place; give "
                f"{name}.resolve_neg()"
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
        x += noise * normal(x.shape, rng, step=step)
        x.clamp_(*clamp)

    Args:
        x: state (B, …), float32, float64, bfloat16 or float16 (arithmetic in float32, float64 for
            double); any dense layout whose outermost storage dimension is the batch.
        grad: gradient of the energy, or the score with ``is_score``, of x's shape and any strides;
            of x's dtype, or bfloat16 or float16 beside a float32 or float64 state.
        rng: int64[3] = (seed, time, number of the first chain) on x's device, see
            :meth:`Key.tensor`; never changed.
        drift, noise, decay, pull: floats, or tables (T or 1, B or 1), float32 or float64, of which
            row ``step`` is used (the only row when T is 1).
        x_ref: reference of the pull, like x.
        grad_clip, grad_norm, step_clip: limits, > 0.
        clamp: (low, high).
        noise_when: 0 as above; 1: the noise (and its row) of step + 1 is added after the clamp and
            is not clamped, for loops that put noise before the gradient; 2: none.
        step: added to the key's time, with which it must stay below 2³² (:meth:`Key.advance` tells;
            the op does not read rng on the host); also the row of tables.
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
        ValueError, TypeError: an argument does not fit, or what is written shares memory with
            another argument (x may be grad, x_ref or xi itself); nothing is changed then.
    """
    check_tensors(x=x)
    options = raw_options(
        "langevin_step_",
        drift=drift,
        noise=noise,
        decay=decay,
        pull=pull,
        x_ref=x_ref,
        is_score=is_score,
        grad_clip=grad_clip,
        grad_norm=grad_norm,
        step_clip=step_clip,
        clamp=clamp,
        noise_when=noise_when,
        step=step,
        xi=xi,
        x_low=x_low,
        stats=stats,
        active=active,
        freeze_nonfinite=freeze_nonfinite,
        frozen_at=frozen_at,
    )
    outputs = {name: t for name, t in options.items() if name in _OUTPUTS and isinstance(t, Tensor)}
    refuse_derivatives("langevin_step_", "an in-place op", x=x, grad=grad, **options)
    _refuse_negated("langevin_step_", x=x, **outputs)
    try:
        _call.coopflow.langevin_step_(x, grad, rng, **options)
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    torch.autograd.graph.increment_version([x, *outputs.values()])
    return x


def langevin_noise_(
    x: Tensor,
    rng: Tensor,
    *,
    noise: Coefficient,
    step: int = 0,
    xi: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Adds the noise of one step alone, in place: the first step of loops with ``noise_when=1``.

    Equivalent to ``x += noise * normal(x.shape, rng, step=step)``;
    the arguments are those of :func:`langevin_step_`.
    """
    check_tensors(x=x)
    options = raw_options("langevin_noise_", noise=noise, step=step, xi=xi, active=active)
    refuse_derivatives("langevin_noise_", "an in-place op", x=x, **options)
    _refuse_negated("langevin_noise_", x=x)
    try:
        _call.coopflow.langevin_noise_(x, rng, **options)
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
    xi: Tensor | None = None,
) -> Tensor:
    """One Langevin update of every chain, as a function of x, grad and tables of coefficients,
    differentiable twice.

    Equivalent to :func:`langevin_step_` on a clone of x; the arguments are its. Clips and clamp
    pass gradients where they change nothing; the norm clip has its full Jacobian
    (m/‖g‖)(I − ĝĝᵀ). x_ref, rng and xi are constants: a ValueError names one that requires grad.
    """
    if torch.is_grad_enabled():
        for name, tensor in {"x_ref": x_ref, "xi": xi}.items():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise ValueError(
                    f"langevin_step: {name} is a constant of the derivative; detach it"
                )
    options = raw_options(
        "langevin_step",
        drift=drift,
        noise=noise,
        decay=decay,
        pull=pull,
        x_ref=x_ref,
        is_score=is_score,
        grad_clip=grad_clip,
        grad_norm=grad_norm,
        step_clip=step_clip,
        clamp=clamp,
        noise_when=noise_when,
        step=step,
        xi=xi,
    )
    if torch.compiler.is_compiling():
        # Dynamo does not see that an argument of func.grad requires grad; of a view it does.
        x, grad = x.view_as(x), grad.view_as(grad)
    try:
        out: Tensor = _call.apply(_LangevinStep, x, grad, rng, *_Options(**options))
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    return out


class BoundStep:
    """The options of :func:`langevin_step_`, bound once for the loop of a chain.

    xi and stats have a row for each step: (T, *x.shape), each row laid out like x, and (T, B, 5).
    The loop knows what the face asks at each call: that x and the gradient need no gradients and
    are seen by no other graph.
    """

    def __init__(self, *, drift: Coefficient, **options: Any) -> None:
        self.options = {"drift": drift, **options}

    def in_place(self, x: Tensor, rng: Tensor, **replaced: Any) -> Callable[[Tensor, int], None]:
        """The step of a state, as a function of (grad, step); options that are given here replace
        the bound ones."""
        if torch.compiler.is_compiling() or is_watched():
            return self._by_the_face(x, rng, replaced)
        raw = raw_options("langevin_step_", **{**self.options, **replaced})
        try:
            bound = _call.coopflow.langevin_bind(x, rng, **raw)
        except RuntimeError as error:
            raise _call.argument_error(error) from None
        # Without a method in Python, which is a tenth of what the call takes.
        op = _call.coopflow.langevin_bound_step_.default._op

        def move(grad: Tensor, step: int) -> None:
            try:
                op(x, grad, bound, step)
            except RuntimeError as error:
                raise _call.argument_error(error) from None

        weakref.finalize(move, _call.coopflow.langevin_unbind, bound).atexit = False
        return move

    def _by_the_face(
        self, x: Tensor, rng: Tensor, replaced: Mapping[str, Any]
    ) -> Callable[[Tensor, int], None]:
        """The same for those who look at the tensors of a step, and at its schema."""

        def move(grad: Tensor, step: int) -> None:
            langevin_step_(x, grad, rng, **self.at(step, **replaced))

        return move

    def at(self, step: int, **replaced: Any) -> dict[str, Any]:
        """The options of :func:`langevin_step_` at a step, some of them replaced."""
        options = {**self.options, **replaced, "step": step}
        if options.get("xi") is not None:
            options["xi"] = options["xi"][step + (options.get("noise_when", 0) == 1)]
        if options.get("stats") is not None:
            options["stats"] = options["stats"][step]
        return options

    def functional(
        self, x: Tensor, grad: Tensor, rng: Tensor, step: int, **replaced: Any
    ) -> Tensor:
        """One step as :func:`langevin_step`, some of its options replaced."""
        options = self.at(step, **replaced)
        return langevin_step(
            x, grad, rng, **{name: v for name, v in options.items() if name not in _OUTPUTS}
        )


def _bounds_of(o: _Options) -> tuple[float, float] | None:
    if o.clamp_low is None and o.clamp_high is None:
        return None
    return (
        -math.inf if o.clamp_low is None else o.clamp_low,
        math.inf if o.clamp_high is None else o.clamp_high,
    )


def _normals(x: Tensor, rng: Tensor, o: _Options, *, wanted: bool) -> Tensor | None:
    """The step's normals where the derivative depends on them: before a clamp they decide where
    gradients pass, and they are the derivative by the noise's scale, if that is ``wanted``."""
    none = o.noise_when == 2 or (o.noise == 0 and o.noise_t is None)
    before_clamp = _bounds_of(o) is not None and o.noise_when == 0
    if none or not (wanted or before_clamp):
        return None
    if o.xi is not None:
        return o.xi
    xi = torch.empty_like(x, dtype=arithmetic_dtype(x.dtype))
    _call.coopflow.normal_(xi, rng, step=o.step + o.noise_when)
    return xi


class _LangevinStep(torch.autograd.Function):
    """(x, grad, rng, *_Options) -> x; its derivative is that of the reference."""

    @staticmethod
    def forward(x: Tensor, grad: Tensor, rng: Tensor, *options: Any) -> Tensor:
        result: Tensor = _call.compute("langevin_step", x, grad, rng, *options)
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
        # Of a raw call that leaves out its last arguments there are fewer.
        needed = dict(zip(_Options._fields, ctx.needs_input_grad[3:], strict=False))
        learned = {t: getattr(o, t) for t in _TABLES if needed.get(t)}
        with torch.no_grad():
            xi = _normals(x, rng, o, wanted="noise_t" in learned)

        def step(x: Tensor, grad: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
            def value(name: str) -> Coefficient:
                table = tables.get(f"{name}_t", getattr(o, f"{name}_t"))
                number: float = getattr(o, name)
                return number if table is None else table

            return reference.langevin_step(
                x,
                grad,
                rng,
                drift=value("drift"),
                noise=0.0 if xi is None else value("noise"),
                decay=value("decay"),
                pull=value("pull"),
                x_ref=o.x_ref,
                is_score=o.is_score,
                grad_clip=o.grad_clip,
                grad_norm=o.grad_norm,
                step_clip=o.step_clip,
                clamp=_bounds_of(o),
                noise_when=2 if xi is None else o.noise_when,
                step=o.step,
                xi=xi,
            )

        dx, dgrad, dtables = _call.pull_back(step, x, grad, learned)(grad_out)
        return (dx, dgrad, None, *[dtables.get(name) for name in _Options._fields[: len(options)]])


_call.positional("langevin_step", _LangevinStep)
_call.register_autograd("langevin_step", _LangevinStep)
_call.register_fake("langevin_step", lambda x, *args, **kwargs: torch.empty_like(x))
_call.register_fake("langevin_step_", _call.no_result)
_call.register_fake("langevin_bind", lambda *args, **kwargs: 0)
_call.register_fake("langevin_bound_step_", _call.no_result)
_call.register_fake("langevin_noise_", _call.no_result)
