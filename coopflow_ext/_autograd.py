"""Derivatives of the functional ops, as autograd.Functions in the form that torch.func accepts.

First derivatives of the couplings are compiled ops. Second derivatives are compositions of torch
ops: autograd takes that route only when it differentiates a backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from coopflow_ext import reference

Gradients = tuple[Tensor | None, ...]
Shapes = Callable[..., Any]  # a fake kernel


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``; its forward alone, at a third of the cost, without derivatives.

    Forward mode, which works under no_grad too, has to reach ``apply``: there it raises.
    """
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return function.forward(*args)
    if torch.compiler.is_compiling() or _are_functorch_transforms_active():
        return function.apply(*args)
    # All that Function.apply comes to here. It would first bind args to forward's signature,
    # inspected at each call: 31 us instead of 15 for a coupling of four numbers.
    plain_apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return plain_apply(*unwrap_dead_wrappers(args))


def _ops() -> Any:
    return torch.ops.coopflow


def _arithmetic(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _over_chains(x: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to broadcast against (B, ...)."""
    return x.reshape(-1, *[1] * (like.dim() - 1))


def _chain_sum(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)


# --- affine coupling ------------------------------------------------------------------------------
# y = x·e^a + b; its backward is (gx, ga, gb) = (gy·e^a, gx·x + gl, gy). Below, h* are the
# cotangents of the backward pass's own results.


class AffineCouplingBackward(torch.autograd.Function):
    """(gy, gl, x, params) -> (gx, gparams)."""

    @staticmethod
    def forward(
        grad_y: Tensor, grad_ladj: Tensor, x: Tensor, params: Tensor
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _ops().affine_coupling_backward(
            grad_y, grad_ladj, x, params
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, hx: Tensor, hparams: Tensor) -> Gradients:
        grad_y, _, x, params = ctx.saved_tensors
        a = _arithmetic(params).select(1, 0)
        ha, hb = _arithmetic(hparams).unbind(1)
        gy, hx = _arithmetic(grad_y), _arithmetic(hx)
        scale = a.exp()
        along = (hx + ha * _arithmetic(x)) * scale
        grad_params = torch.stack((along * gy, torch.zeros_like(along)), dim=1)
        return (
            (along + hb).to(grad_y.dtype),
            _chain_sum(ha),
            (ha * gy * scale).to(x.dtype),
            grad_params.to(params.dtype),
        )


class AffineCoupling(torch.autograd.Function):
    """(x, params) -> (y, ladj)."""

    @staticmethod
    def forward(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _ops().affine_coupling(x, params)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_ladj: Tensor) -> Gradients:
        x, params = ctx.saved_tensors
        result: Gradients = apply(
            AffineCouplingBackward, grad_y.contiguous(), grad_ladj.contiguous(), x, params
        )
        return result


class AffineCouplingInverseBackward(torch.autograd.Function):
    """(gx, gl, x, params) -> (gy, gparams), x the inverse's output."""

    @staticmethod
    def forward(
        grad_x: Tensor, grad_ladj: Tensor, x: Tensor, params: Tensor
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _ops().affine_coupling_inverse_backward(
            grad_x, grad_ladj, x, params
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, hy: Tensor, hparams: Tensor) -> Gradients:
        grad_x, _, x, params = ctx.saved_tensors
        a = _arithmetic(params).select(1, 0)
        ha, hb = _arithmetic(hparams).unbind(1)
        gx = _arithmetic(grad_x)
        along = (_arithmetic(hy) - hb) * (-a).exp()
        grad_params = torch.stack((-along * gx, torch.zeros_like(along)), dim=1)
        return (
            (along - ha * _arithmetic(x)).to(grad_x.dtype),
            -_chain_sum(ha),
            (-ha * gx).to(x.dtype),
            grad_params.to(params.dtype),
        )


class AffineCouplingInverse(torch.autograd.Function):
    """(y, params) -> (x, ladj)."""

    @staticmethod
    def forward(y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _ops().affine_coupling_inverse(y, params)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(output[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_ladj: Tensor) -> Gradients:
        x, params = ctx.saved_tensors
        result: Gradients = apply(
            AffineCouplingInverseBackward, grad_x.contiguous(), grad_ladj.contiguous(), x, params
        )
        return result


# --- mixture-of-logistics coupling ----------------------------------------------------------------
# The backward pass of the backward pass differentiates the plain-PyTorch formulas of the first.


def _mixture_gradients(
    grad_y: Tensor, grad_ladj: Tensor, x: Tensor, params: Tensor, affine: bool
) -> tuple[Tensor, Tensor]:
    """What the compiled backward computes: (gx, gparams)."""

    def forward(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return reference.mixture_logistic_coupling(x, params, affine=affine)

    gradients: tuple[Tensor, Tensor] = torch.func.vjp(forward, x, params)[1]((grad_y, grad_ladj))
    return gradients


def _mixture_inverse_gradients(
    grad_x: Tensor,
    grad_ladj: Tensor,
    y: Tensor,
    x: Tensor,
    params: Tensor,
    affine: bool,
    legacy_cdf_clamp: bool,
) -> tuple[Tensor, Tensor]:
    """What the compiled backward of the inverse computes: (gy, gparams).

    x is a function of v = y·e^{−a} − b and the mixture through logit F(x) = v, and ladj is
    −(log slope(x) + a): the derivatives of logit F and its log slope are those of the forward
    coupling with a = b = 0.
    """

    def forward(x: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor]:
        return reference.mixture_logistic_coupling(x, mixture, affine=False)

    work = _arithmetic(x).dtype
    y, grad_x, x = y.to(work), grad_x.to(work), x.to(work)
    head, mixture = params.to(work).split(
        [2, params.shape[1] - 2] if affine else [0, params.shape[1]], dim=1
    )
    pull_back = torch.func.vjp(forward, x, mixture)[1]
    slope, _ = pull_back((torch.ones_like(x), torch.zeros_like(grad_ladj)))
    along, _ = pull_back((torch.zeros_like(x), -grad_ladj))
    grad_v = (grad_x + along) / slope.clamp(min=torch.finfo(work).tiny)
    _, grad_mixture = pull_back((-grad_v, -grad_ladj))
    a, b = head.unbind(1) if affine else (torch.zeros_like(x), torch.zeros_like(x))
    scaled = y * (-a).exp()
    gl = _over_chains(grad_ladj, x)
    if legacy_cdf_clamp:
        v = scaled - b
        clamped = v.abs() > reference.LEGACY_LOGIT_LIMIT
        grad_v = torch.where(clamped, -gl * torch.tanh(v / 2), grad_v)
    if not affine:
        return grad_v, grad_mixture
    grad_head = torch.stack((-gl - grad_v * scaled, -grad_v), dim=1)
    return grad_v * (-a).exp(), torch.cat((grad_head, grad_mixture), dim=1)


class MixtureLogisticCouplingBackward(torch.autograd.Function):
    """(gy, gl, x, params, affine) -> (gx, gparams)."""

    @staticmethod
    def forward(
        grad_y: Tensor, grad_ladj: Tensor, x: Tensor, params: Tensor, affine: bool
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _ops().mixture_logistic_coupling_backward(
            grad_y, grad_ladj, x, params, affine
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.affine = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, hx: Tensor, hparams: Tensor) -> Gradients:
        def gradients(gy: Tensor, gl: Tensor, x: Tensor, params: Tensor) -> tuple[Tensor, ...]:
            gx, gparams = _mixture_gradients(gy, gl, x, params, ctx.affine)
            return gx.to(x.dtype), gparams.to(params.dtype)

        pull_back = torch.func.vjp(gradients, *ctx.saved_tensors)[1]
        return (*pull_back((hx, hparams)), None)


class MixtureLogisticCoupling(torch.autograd.Function):
    """(x, params, affine) -> (y, ladj)."""

    @staticmethod
    def forward(x: Tensor, params: Tensor, affine: bool) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _ops().mixture_logistic_coupling(x, params, affine)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, params, ctx.affine = inputs
        ctx.save_for_backward(x, params)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_ladj: Tensor) -> Gradients:
        gradients: tuple[Tensor, Tensor] = apply(
            MixtureLogisticCouplingBackward,
            grad_y.contiguous(),
            grad_ladj.contiguous(),
            *ctx.saved_tensors,
            ctx.affine,
        )
        return (*gradients, None)


class MixtureLogisticCouplingInverseBackward(torch.autograd.Function):
    """(gx, gl, y, x, params, affine, legacy_cdf_clamp) -> (gy, gparams), x the inverse's output."""

    @staticmethod
    def forward(
        grad_x: Tensor,
        grad_ladj: Tensor,
        y: Tensor,
        x: Tensor,
        params: Tensor,
        affine: bool,
        legacy_cdf_clamp: bool,
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _ops().mixture_logistic_coupling_inverse_backward(
            grad_x, grad_ladj, y, x, params, affine, legacy_cdf_clamp
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.affine, ctx.legacy_cdf_clamp = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, hy: Tensor, hparams: Tensor) -> Gradients:
        def gradients(
            gx: Tensor, gl: Tensor, y: Tensor, x: Tensor, params: Tensor
        ) -> tuple[Tensor, ...]:
            gy, gparams = _mixture_inverse_gradients(
                gx, gl, y, x, params, ctx.affine, ctx.legacy_cdf_clamp
            )
            return gy.to(y.dtype), gparams.to(params.dtype)

        pull_back = torch.func.vjp(gradients, *ctx.saved_tensors)[1]
        return (*pull_back((hy, hparams)), None, None)


class MixtureLogisticCouplingInverse(torch.autograd.Function):
    """(y, params, affine, legacy_cdf_clamp) -> (x, ladj)."""

    @staticmethod
    def forward(
        y: Tensor, params: Tensor, affine: bool, legacy_cdf_clamp: bool
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _ops().mixture_logistic_coupling_inverse(
            y, params, affine, legacy_cdf_clamp
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, params, *ctx.options = inputs
        ctx.save_for_backward(y, output[0], params)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_ladj: Tensor) -> Gradients:
        gradients: tuple[Tensor, Tensor] = apply(
            MixtureLogisticCouplingInverseBackward,
            grad_x.contiguous(),
            grad_ladj.contiguous(),
            *ctx.saved_tensors,
            *ctx.options,
        )
        return (*gradients, None, None)


# --- Langevin step --------------------------------------------------------------------------------


class LangevinOptions(NamedTuple):
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


def _coefficient(value: float, table: Tensor | None, step: int, x: Tensor) -> float | Tensor:
    """One step's coefficient, broadcastable against x."""
    if table is None:
        return value
    row = table[step if table.shape[0] > 1 else 0]
    return _over_chains(row.to(_arithmetic(x).dtype), x)


def _noise(x: Tensor, rng: Tensor, o: LangevinOptions) -> float | Tensor:
    """The noise that the clamp saw."""
    if o.noise_when != 0 or (o.noise == 0 and o.noise_t is None):
        return 0.0
    scale = _coefficient(o.noise, o.noise_t, o.step, x)
    if o.xi is not None:
        return scale * _arithmetic(o.xi)
    xi = torch.empty_like(x, dtype=_arithmetic(x).dtype)
    _ops().normal_(xi, rng, step=o.step, chain_offset=o.chain_offset)
    return scale * xi


def _grad_norm_vjp(g: Tensor, v: Tensor, limit: float) -> Tensor:
    """vjp of g ↦ g·min(1, limit/‖g‖) per chain: (limit/‖g‖)(I − ĝĝᵀ)v where it is active."""
    norm = _chain_sum(g.square()).sqrt()
    clipped = _over_chains(norm > limit, g)
    safe = _over_chains(torch.where(norm > limit, norm, torch.ones_like(norm)), g)
    unit = g / safe
    projected = v - unit * _over_chains(_chain_sum(unit * v), g)
    return torch.where(clipped, projected * (limit / safe), v)


def langevin_step_vjp(
    grad_out: Tensor, x: Tensor, grad: Tensor, rng: Tensor, o: LangevinOptions
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x and grad, in torch ops that autograd can differentiate again."""
    drift = _coefficient(o.drift, o.drift_t, o.step, x)
    decay = _coefficient(o.decay, o.decay_t, o.step, x)
    pull = _coefficient(o.pull, o.pull_t, o.step, x)
    state, g = _arithmetic(x), _arithmetic(-grad if o.is_score else grad)
    clipped = g if o.grad_clip is None else g.clamp(-o.grad_clip, o.grad_clip)
    go = _arithmetic(grad_out)
    gd = -go
    clamps = o.clamp_low is not None or o.clamp_high is not None
    if clamps or o.step_clip is not None:
        with torch.no_grad():
            scaled = clipped
            if o.grad_norm is not None:
                norm = _chain_sum(clipped.square()).sqrt()
                scale = torch.where(norm > o.grad_norm, o.grad_norm / norm, torch.ones_like(norm))
                scaled = clipped * _over_chains(scale, x)
            d = drift * scaled + decay * state
            if o.x_ref is not None:
                d = d + pull * (state - _arithmetic(o.x_ref))
            limit = math.inf if o.step_clip is None else o.step_clip
            y = state - d.clamp(-limit, limit) + _noise(x, rng, o)
            low = -math.inf if o.clamp_low is None else o.clamp_low
            high = math.inf if o.clamp_high is None else o.clamp_high
            inside = (y >= low) & (y <= high)
            unclipped = d.abs() <= limit
        go = go * inside
        gd = -go * unclipped
    gx = go + (decay + pull) * gd
    gg = drift * gd
    if o.grad_norm is not None:
        gg = _grad_norm_vjp(clipped, gg, o.grad_norm)
    if o.grad_clip is not None:
        gg = gg * (g.abs() <= o.grad_clip)
    return gx.to(x.dtype), (-gg if o.is_score else gg).to(grad.dtype)


class LangevinStep(torch.autograd.Function):
    """(x, grad, rng, *LangevinOptions) -> x."""

    @staticmethod
    def forward(x: Tensor, grad: Tensor, rng: Tensor, *options: Any) -> Tensor:
        result: Tensor = _ops().langevin_step(x, grad, rng, *options)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*tensors)
        ctx.values = [None if isinstance(value, Tensor) else value for value in inputs]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Gradients:
        x, grad, rng, *options = (
            value if tensor is None else tensor
            for tensor, value in zip(ctx.saved_tensors, ctx.values, strict=True)
        )
        gx, gg = langevin_step_vjp(grad_out, x, grad, rng, LangevinOptions(*options))
        return (gx, gg, None, *[None] * len(options))


# --- registration ---------------------------------------------------------------------------------


def _check_devices(op: str, given: dict[str, Any]) -> None:
    """What the kernels check, for calls that end at a fake kernel because one tensor is "meta"."""
    first, *others = ((name, t) for name, t in given.items() if isinstance(t, Tensor))
    for name, tensor in others:
        if tensor.device != first[1].device:
            raise ValueError(
                f"{op}: {name.removesuffix('_t')}: must be on the device of {first[0]}, "
                f"{first[1].device}, got {tensor.device}"
            )


def _fake(name: str, *, on_host: str | None = None) -> Callable[[Shapes], Shapes]:
    """Registers the shapes of an op's results. The host reads the argument ``on_host``."""
    op = f"coopflow::{name}"
    names = [argument.name for argument in getattr(_ops(), name).default._schema.arguments]

    def register(shapes: Shapes) -> Shapes:
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if on_host and (device := given.pop(on_host).device).type != "cpu":
                raise ValueError(f"{op}: {on_host}: must be on the CPU, got {device}")
            _check_devices(op, given)
            return shapes(*args, **kwargs)

        torch.library.register_fake(op)(checked)
        return shapes

    return register


def _register_fake() -> None:
    @_fake("normal_")
    def _(out: Tensor, rng: Tensor, **kwargs: Any) -> None:
        return None

    @_fake("uniform_")
    def _(out: Tensor, rng: Tensor, **kwargs: Any) -> None:
        return None

    @_fake("langevin_step_")
    def _(x: Tensor, grad: Tensor, rng: Tensor, **kwargs: Any) -> None:
        return None

    @_fake("langevin_plain_step_", on_host="numbers")
    def _(x: Tensor, *arguments: Any) -> None:
        return None

    @_fake("langevin_noise_")
    def _(x: Tensor, rng: Tensor, **kwargs: Any) -> None:
        return None

    @_fake("langevin_step")
    def _(x: Tensor, grad: Tensor, rng: Tensor, *options: Any, **kwargs: Any) -> Tensor:
        return torch.empty_like(x)

    def coupling(state: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(state), state.new_empty(
            state.shape[0], dtype=_arithmetic(state).dtype
        )

    def coupling_backward(
        grad_out: Tensor, grad_ladj: Tensor, x: Tensor, params: Tensor
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(params)

    for name in ("affine_coupling", "affine_coupling_inverse"):
        _fake(name)(coupling)
        _fake(f"{name}_backward")(coupling_backward)

    @_fake("mixture_logistic_coupling")
    def _(x: Tensor, params: Tensor, *options: bool) -> tuple[Tensor, Tensor]:
        return coupling(x, params)

    @_fake("mixture_logistic_coupling_inverse")
    def _(y: Tensor, params: Tensor, *options: bool) -> tuple[Tensor, Tensor]:
        return coupling(y, params)

    @_fake("mixture_logistic_coupling_backward")
    def _(
        grad_y: Tensor, grad_ladj: Tensor, x: Tensor, params: Tensor, *options: bool
    ) -> tuple[Tensor, Tensor]:
        return coupling_backward(grad_y, grad_ladj, x, params)

    @_fake("mixture_logistic_coupling_inverse_backward")
    def _(
        grad_x: Tensor, grad_ladj: Tensor, y: Tensor, x: Tensor, params: Tensor, *options: bool
    ) -> tuple[Tensor, Tensor]:
        return coupling_backward(grad_x, grad_ladj, x, params)


def _register_autograd() -> None:
    """The same formulas for those who call the raw ops; torch.func needs the Functions above."""
    for name, function in {
        "affine_coupling": AffineCoupling,
        "affine_coupling_inverse": AffineCouplingInverse,
        "affine_coupling_backward": AffineCouplingBackward,
        "affine_coupling_inverse_backward": AffineCouplingInverseBackward,
        "mixture_logistic_coupling": MixtureLogisticCoupling,
        "mixture_logistic_coupling_inverse": MixtureLogisticCouplingInverse,
        "mixture_logistic_coupling_backward": MixtureLogisticCouplingBackward,
        "mixture_logistic_coupling_inverse_backward": MixtureLogisticCouplingInverseBackward,
        "langevin_step": LangevinStep,
    }.items():
        torch.library.register_autograd(
            f"coopflow::{name}", function.backward, setup_context=function.setup_context
        )


def register() -> None:
    """Teaches torch the shapes and derivatives of the ops, once the library is loaded."""
    _register_fake()
    _register_autograd()
