"""The Langevin sampler: a drop-in for the loop x ← x − drift·∇U + noise·ξ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from coopflow_ext.errors import NonFiniteError
from coopflow_ext.rng import Key
from coopflow_ext.samplers.chain import Chain, Plan, pack, unpack
from coopflow_ext.samplers.gradient import Gradient, StateFunction, Tensors, frozen
from coopflow_ext.samplers.output import SamplerOutput, State
from coopflow_ext.samplers.schedule import (
    Coefficient,
    Schedule,
    check_count,
    check_number,
    coefficient,
    per_chain,
    sqrt,
)

_MAX_CHAIN = 2**63


def _drift_and_noise(
    step_size: Schedule | None,
    drift: Schedule | None,
    noise: Schedule | None,
    temperature: Schedule | None,
    n_steps: int,
) -> tuple[Coefficient, Coefficient]:
    """The two coefficients of an update from the options that may fix them."""
    if (step_size is None) == (drift is None):
        raise ValueError("give exactly one of step_size (drift δ²/2, noise δ) and drift")
    if noise is not None and step_size is not None:
        raise ValueError("noise goes with drift; step_size already fixes the noise")
    if noise is not None and temperature is not None:
        raise ValueError("temperature and noise both fix the scale of the noise; give one")
    if step_size is not None:
        s = coefficient("step_size", step_size, n_steps)
        a: Coefficient = s * s / 2
    else:
        assert drift is not None
        a = coefficient("drift", drift, n_steps)
        if noise is not None:
            return a, coefficient("noise", noise, n_steps)
        s = sqrt(2 * a)
    if temperature is not None:
        s = s * sqrt(coefficient("temperature", temperature, n_steps))
    return a, s


def _check_clamp(clamp: tuple[float, float] | None) -> tuple[float, float] | None:
    if clamp is None:
        return None
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        raise TypeError(f"clamp must be a pair (lo, hi), got {clamp!r}")
    lo, hi = float(clamp[0]), float(clamp[1])
    if not lo <= hi:
        raise ValueError(f"clamp must be (lo, hi) with lo ≤ hi, got ({lo}, {hi})")
    return lo, hi


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_state(x0: State) -> Tensors:
    """The tensors of a state; TypeError or ValueError unless they are chains that can move."""
    if not isinstance(x0, (Tensor, list, tuple)):
        raise TypeError(f"x0 must be a tensor or a list or tuple of them, got {type(x0).__name__}")
    xs = unpack(x0)
    if not xs or not all(isinstance(x, Tensor) for x in xs):
        raise TypeError("x0 must be a tensor or a non-empty list or tuple of tensors")
    for x in xs:
        if not x.is_floating_point():
            raise TypeError(f"x0 must be floating point, got {x.dtype}")
        if x.ndim == 0:
            raise ValueError("x0 must be (B, …): dimension 0 counts the chains; got a scalar")
        if x.shape[0] != xs[0].shape[0] or x.device != xs[0].device:
            raise ValueError(
                "the tensors of x0 must have the same number of chains and the same device, got "
                f"{xs[0].shape[0]} on {xs[0].device} and {x.shape[0]} on {x.device}"
            )
    return xs


def state_copy(x: Tensor) -> Tensor:
    """A copy that a chain may overwrite: dense, with the batch as outermost dimension."""
    keep = x.ndim in (4, 5) and x.is_contiguous(
        memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    )
    layout = torch.preserve_format if keep else torch.contiguous_format
    return x.detach().clone(memory_format=layout)


def _check_like(name: str, values: State, xs: Tensors, lead: tuple[int, ...] = ()) -> Tensors:
    """The tensors of ``values``; each must have the shape of the state's, after ``lead``."""
    given = unpack(values)
    if len(given) != len(xs):
        raise ValueError(f"{name} must have {len(xs)} tensor(s), like x0, got {len(given)}")
    for value, x in zip(given, xs, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor like x0, got {type(value).__name__}")
        if value.shape != (*lead, *x.shape):
            expected = (*lead, *x.shape)
            raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    return given


def _laid_out_like(value: Tensor, x: Tensor) -> Tensor:
    """A copy of ``value`` with x's dtype, device and memory layout."""
    return torch.empty_like(x).copy_(value)


class LangevinSampler:
    """Langevin chains x ← x − drift·∇U(x) + noise·ξ, ξ ~ N(0, I), p ∝ exp(−U).

    Equivalent to, for each of n_steps steps (plain options)::

        grad, = torch.autograd.grad(energy(x).sum(), x)
        x = (x - drift * grad + noise * torch.randn_like(x)).clamp(lo, hi)

    but fused, with noise that depends only on the key, the chain's number and the step, never on
    the batch size, the device or the number of threads.

    Args:
        energy: nn.Module or callable of the state; returns U as (B,), (B, 1) or (B, 1, 1, 1). Its
            parameters are frozen during the chain and restored after it.
        score: instead of energy, a callable that gives ∇log p = −∇U, of x's shape.
        n_steps: number of steps T.
        step_size: δ: drift δ²/2, noise δ·√temperature.
        drift: instead of step_size; without ``noise``, the noise is √(2·drift·temperature).
        noise: standard deviation of the noise of a step; only with ``drift``. 0 turns it off.
        temperature: multiplies the noise by its square root, leaves the drift.
        negative_energy: ``energy`` returns f = −U.
        grad_clip: clip each element of the gradient to ±grad_clip.
        grad_norm: then scale each chain's gradient to L2 norm ≤ grad_norm.
        step_clip: clip each element of the scaled step (drift, without noise) to ±step_clip.
        clamp: (lo, hi), bounds of the state.
        clamp_when: clamp at every "step" or only at the "end".
        noise_before_gradient: x′ = x + noise·ξ, and the gradient is taken at x′.
        reference_std: σ of a Gaussian reference; adds ‖x‖²/(2σ²) to U.
        pull: (x_ref, strength), adds ½·strength·‖x − x_ref‖² to U; strength a float or (B,).
            x_ref None means that it is given at the call.
        return_trajectory: keep the states after steps thin, 2·thin, …
        thin: see return_trajectory.
        stats: record :class:`ChainStatistics`.
        on_nonfinite: a chain is masked from its first non-finite gradient on, so that it keeps its
            last finite state; then "raise" :class:`NonFiniteError` after the chain, or "freeze"
            silently. "ignore": no mask, no check.
        chain_offset: number of the first chain; shards of one batch pass where they start.

    step_size, drift, noise and temperature are a float, a callable of the step, (T,) values, or a
    tensor (T or 1, B or 1). With ``channels_last`` states, elements of a chain take their noise in
    storage order.

    Raises:
        ValueError, TypeError: for an option that is out of range or contradicts another; the
            message names it.
    """

    def __init__(
        self,
        energy: StateFunction | None = None,
        *,
        n_steps: int,
        score: StateFunction | None = None,
        step_size: Schedule | None = None,
        drift: Schedule | None = None,
        noise: Schedule | None = None,
        temperature: Schedule | None = None,
        negative_energy: bool = False,
        grad_clip: float | None = None,
        grad_norm: float | None = None,
        step_clip: float | None = None,
        clamp: tuple[float, float] | None = None,
        clamp_when: Literal["step", "end"] = "step",
        noise_before_gradient: bool = False,
        reference_std: float | None = None,
        pull: tuple[State | None, float | Tensor] | None = None,
        return_trajectory: bool = False,
        thin: int = 1,
        stats: bool = False,
        on_nonfinite: Literal["raise", "freeze", "ignore"] = "raise",
        chain_offset: int = 0,
    ) -> None:
        n_steps = check_count("n_steps", n_steps, 0)
        _check_choice("clamp_when", clamp_when, ("step", "end"))
        _check_choice("on_nonfinite", on_nonfinite, ("raise", "freeze", "ignore"))
        a, s = _drift_and_noise(step_size, drift, noise, temperature, n_steps)
        coefficients = {"drift": a, "noise": s}
        if reference_std is not None:
            sigma = check_number("reference_std", reference_std, minimum=0.0, exclusive=True)
            coefficients["decay"] = a / sigma**2
        self.x_ref: State | None = None
        self.needs_x_ref = pull is not None
        if pull is not None:
            self.x_ref, strength = _check_pull(pull)
            coefficients["pull"] = a * strength
        limits = {"grad_clip": grad_clip, "grad_norm": grad_norm, "step_clip": step_clip}
        self.chain_offset = _check_offset(chain_offset)
        self.on_nonfinite = on_nonfinite
        self.plan = Plan(
            gradient=Gradient(energy, score, negative_energy=negative_energy),
            n_steps=n_steps,
            coefficients=coefficients,
            clips={
                name: check_number(name, limit, minimum=0.0, exclusive=True)
                for name, limit in limits.items()
                if limit is not None
            },
            clamp=_check_clamp(clamp),
            clamp_at_end=clamp_when == "end",
            noise_first=noise_before_gradient,
            thin=check_count("thin", thin, 1),
            keep_trajectory=return_trajectory,
            keep_stats=stats,
            masked=on_nonfinite != "ignore",
        )

    def __call__(
        self,
        x0: State,
        *,
        key: Key | None = None,
        xi: State | None = None,
        x_ref: State | None = None,
        chain_offset: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> SamplerOutput:
        """Run the chains from x0, which is not modified.

        Args:
            x0: (B, …), floating point, or a list or tuple of such tensors; detached.
            key: where the noise comes from; None draws a seed from torch's default generator.
            xi: the standard normals to use instead, (T, *x0.shape).
            x_ref: centre of the pull, shape of x0; replaces the one in ``pull=``.
            chain_offset: replaces the option of that name.
            model_kwargs: further keyword arguments of the energy or score.

        Raises:
            NonFiniteError: with on_nonfinite="raise", when a gradient is not finite.
            OverflowError: when the key's time would reach 2³².
        """
        xs = check_state(x0)
        key = Key.from_default_generator() if key is None else key
        after = key.advance(self.plan.n_steps)
        offset = self.chain_offset if chain_offset is None else _check_offset(chain_offset)
        # An energy needs autograd; a score runs as it would in the caller's own loop.
        grad_mode = self.plan.gradient.has_energy or torch.is_grad_enabled()
        with torch.inference_mode(False), frozen(self.plan.gradient.module):
            starts = tuple(state_copy(x) for x in xs)
            chain = Chain(
                self.plan,
                starts,
                _rng_tensors(key, xs),
                like=x0,
                x_refs=self._x_refs(x_ref, starts),
                xis=self._xis(xi, starts),
                chain_offset=offset,
                model_kwargs={} if model_kwargs is None else model_kwargs,
            )
            with torch.set_grad_enabled(grad_mode):
                chain.run()
        if self.on_nonfinite == "raise":
            _raise_if_frozen(chain, x0)
        trajectory = None if chain.trajectory is None else pack(chain.trajectory, x0)
        return SamplerOutput(pack(chain.xs, x0), after, trajectory, chain.statistics())

    def _x_refs(self, x_ref: State | None, xs: Tensors) -> Tensors | None:
        if x_ref is not None and not self.needs_x_ref:
            raise ValueError("x_ref needs the option pull=(None, strength)")
        centre = self.x_ref if x_ref is None else x_ref
        if not self.needs_x_ref:
            return None
        if centre is None:
            raise ValueError("pull=(None, strength) needs x_ref= at the call")
        values = _check_like("x_ref", centre, xs)
        return tuple(_laid_out_like(v, x) for v, x in zip(values, xs, strict=True))

    def _xis(self, xi: State | None, xs: Tensors) -> tuple[tuple[Tensor, ...], ...] | None:
        """For each tensor of the state, the normals of each step in its layout."""
        if xi is None:
            return None
        values = _check_like("xi", xi, xs, lead=(self.plan.n_steps,))
        return tuple(
            tuple(_laid_out_like(row, x) for row in v.unbind(0))
            for v, x in zip(values, xs, strict=True)
        )


def _check_pull(
    pull: tuple[State | None, float | Tensor],
) -> tuple[State | None, Coefficient]:
    if not isinstance(pull, (tuple, list)) or len(pull) != 2:
        raise TypeError("pull must be a pair (x_ref, strength)")
    x_ref, strength = pull
    if x_ref is not None and not isinstance(x_ref, (Tensor, list, tuple)):
        raise TypeError(f"pull's x_ref must be a tensor or None, got {type(x_ref).__name__}")
    return x_ref, per_chain("pull's strength", strength)


def _check_offset(chain_offset: object) -> int:
    offset = check_count("chain_offset", chain_offset, 0)
    if offset >= _MAX_CHAIN:
        raise ValueError(f"chain_offset must be below 2**63, got {offset}")
    return offset


def _rng_tensors(key: Key, xs: Tensors) -> Tensors:
    """Tensor 0 of a state uses the key's seed, tensor j folds in j."""
    return tuple((key.fold_in(j) if j else key).tensor(x.device) for j, x in enumerate(xs))


def _raise_if_frozen(chain: Chain, like: State) -> None:
    """The one read of the mask, after the chain."""
    if chain.active is None or bool(chain.active.all()):
        return
    assert chain.steps_alive is not None
    chains = (~chain.active).nonzero().flatten().cpu()
    step = int(chain.steps_alive.min())
    shown = ", ".join(map(str, chains[:8].tolist())) + (", …" if len(chains) > 8 else "")
    raise NonFiniteError(
        f"the gradient was not finite in {len(chains)} of {len(chain.active)} chains ({shown}), "
        f"first at step {step}; use a smaller step, clips, or on_nonfinite='freeze'",
        step=step,
        chains=chains,
        x=chain.xs[0] if isinstance(like, Tensor) else chain.xs,
    )
