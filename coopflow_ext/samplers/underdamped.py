"""Underdamped Langevin dynamics with the BAOAB splitting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext._tensors import (
    Coefficient,
    arithmetic_dtype,
    flat,
    per_chain_view,
    room_for,
    table_row,
)
from coopflow_ext.rng import USE_MOMENTUM, Key
from coopflow_ext.samplers.chain import laid_out, mask_jointly
from coopflow_ext.samplers.checks import (
    check_chain_counts,
    check_choice,
    check_count,
    check_flag,
    check_kwargs,
    check_like,
    check_single_state,
    check_steps,
)
from coopflow_ext.samplers.gradient import Gradient, StateFunction, constant, parameters_of
from coopflow_ext.samplers.inputs import normals_like, state_copy
from coopflow_ext.samplers.output import Trajectory, nonfinite_error
from coopflow_ext.samplers.schedule import (
    Schedule,
    chain_counts,
    coefficient,
    place,
    sqrt,
)


@dataclass(frozen=True)
class UnderdampedStatistics:
    """At the end of each step, per chain, each (T, B).

    Attributes:
        energy: U; None with ``score=``.
        grad_norm: L2 norm of ∇U.
        kinetic: ½‖v‖².
    """

    energy: Tensor | None
    grad_norm: Tensor
    kinetic: Tensor


class UnderdampedOutput(NamedTuple):
    """See :class:`SamplerOutput`; ``velocity``, like x, continues the path with ``key``."""

    x: Tensor
    key: Key
    trajectory: Tensor | None
    stats: UnderdampedStatistics | None
    velocity: Tensor


class UnderdampedLangevinSampler:
    """dx = v dt, dv = −∇U dt − γv dt + √(2γτ) dW, unit mass, by the BAOAB splitting.

    One step of size h, with c = exp(−γh)::

        v -= h/2 · ∇U(x);  x += h/2 · v
        v = c · v + √(τ(1 − c²)) · ξ
        x += h/2 · v;  v -= h/2 · ∇U(x)

    For U = λx²/2 the stationary variance of the position is exactly τ/λ for every h²λ < 4.
    Leimkuhler and Matthews, J. Chem. Phys. 138 (2013).

    Args:
        energy, score, negative_energy: as in :class:`LangevinSampler`.
        n_steps: number of steps T; each takes one gradient.
        step_size: h; a float, a callable of the step, (T,) or (T or 1, B or 1), as are the next.
        friction: γ ≥ 0.
        temperature: τ ≥ 0; p ∝ exp(−U/τ).
        return_trajectory, thin, stats: as in :class:`LangevinSampler`; ``stats`` are
            :class:`UnderdampedStatistics`.
        on_nonfinite: a chain whose gradient is not finite stays where that was found, one that
            would leave the finite numbers where it was; then "raise", "freeze" or "ignore" as in
            :class:`LangevinSampler`.

    Raises:
        ValueError, TypeError: for an option out of range, by name.
    """

    def __init__(
        self,
        energy: StateFunction | None = None,
        *,
        n_steps: int,
        step_size: Schedule,
        friction: Schedule = 1.0,
        temperature: Schedule = 1.0,
        score: StateFunction | None = None,
        negative_energy: bool = False,
        return_trajectory: bool = False,
        thin: int = 1,
        stats: bool = False,
        on_nonfinite: Literal["raise", "freeze", "ignore"] = "raise",
    ) -> None:
        check_flag("negative_energy", negative_energy)
        self.gradient = Gradient(energy, score, negative_energy=negative_energy)
        self.n_steps = check_steps(n_steps)
        self.half_step = coefficient("step_size", step_size, n_steps) / 2
        gamma = coefficient("friction", friction, n_steps)
        tau = coefficient("temperature", temperature, n_steps)
        self.chain_counts = chain_counts(
            {"step_size": self.half_step, "friction": gamma, "temperature": tau}
        )
        self.keep = _exp(-2 * gamma * self.half_step)
        self.noise = sqrt(tau * (1 - self.keep * self.keep))
        self.start_std = sqrt(tau)
        check_choice("on_nonfinite", on_nonfinite, ("raise", "freeze", "ignore"))
        self.on_nonfinite = on_nonfinite
        self.return_trajectory = check_flag("return_trajectory", return_trajectory)
        self.stats = check_flag("stats", stats)
        self.thin = check_count("thin", thin, 1)

    def __call__(
        self,
        x0: Tensor,
        *,
        key: Key | None = None,
        xi: Tensor | None = None,
        velocity: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> UnderdampedOutput:
        """Run the chains from x0 (B, …), which is not modified; arguments as LangevinSampler's.

        Args:
            velocity: v at the start, shape of x0; by default drawn from N(0, τ) with the key.

        Raises:
            NonFiniteError: with on_nonfinite="raise", when a gradient or state is not finite.
        """
        x0 = check_single_state("UnderdampedLangevinSampler", x0)
        check_chain_counts(self.chain_counts, len(x0))
        key = Key.or_default(key)
        key.check_batch(len(x0))
        after = key.advance(self.n_steps)
        kwargs = check_kwargs(model_kwargs)
        grad_mode = self.gradient.has_energy or torch.is_grad_enabled()
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(grad_mode),
            constant(parameters_of(self.gradient.module)),
        ):
            x = state_copy(x0)
            if velocity is None:
                v = self._start_velocity(x, key)
            else:
                v = laid_out(check_like("velocity", velocity, (x,))[0].detach(), x)
            xis = normals_like(xi, (x,), self.n_steps)
            noise, rng = place("noise", self.noise, x), key.tensor(x.device)
            keep, half = place("friction", self.keep, x), place("step_size", self.half_step, x)
            trajectory = Trajectory(x, self.n_steps, self.thin, keep=self.return_trajectory)
            active = x.new_ones(len(x), dtype=torch.bool)
            frozen_at = torch.full_like(active, self.n_steps, dtype=torch.int64)
            masks = active, frozen_at
            grad, _ = self._gradient(x, kwargs, masks, 0)
            stats = self._empty_statistics(x) if self.stats else None
            for step in range(self.n_steps):
                h, c = _at(half, step, x), _at(keep, step, x)
                v_new = v - h * grad
                x_new = x + h * v_new
                v_new = ops.langevin_noise_(
                    c * v_new, rng, noise=noise, step=step,
                    xi=None if xis is None else xis[0][step],
                )  # fmt: skip
                x_new += h * v_new
                self._stop(masks, step, x_new)  # which may overflow where the gradient was finite
                self._assign(x, x_new, active)
                self._assign(v, v_new, active)
                grad, u = self._gradient(x, kwargs, masks, step + 1)
                self._assign(v, v - h * grad, active)
                trajectory.record(step, x)
                if stats is not None:
                    _record(stats, step, u, grad, v)
        if self.on_nonfinite == "raise" and not bool(active.all()):
            advice = "use a smaller step or on_nonfinite='freeze'"
            what = "the gradient or state"
            raise nonfinite_error(active, frozen_at, (x,), what=what, advice=advice)
        return UnderdampedOutput(x, after, trajectory.states, stats, v)

    def _start_velocity(self, x: Tensor, key: Key) -> Tensor:
        std = place("start_std", self.start_std, x)
        rng = key.fold_in(USE_MOMENTUM).tensor(x.device)
        return ops.langevin_noise_(torch.zeros_like(x), rng, noise=std)

    def _empty_statistics(self, x: Tensor) -> UnderdampedStatistics:
        shape, dtype = (3, self.n_steps, len(x)), arithmetic_dtype(x.dtype)
        with room_for("statistics", shape, dtype):
            energy, grad_norm, kinetic = x.new_empty(shape, dtype=dtype)
        return UnderdampedStatistics(
            energy if self.gradient.has_energy else None, grad_norm, kinetic
        )

    def _gradient(
        self, x: Tensor, kwargs: Mapping[str, Any], masks: tuple[Tensor, Tensor], step: int
    ) -> tuple[Tensor, Tensor | None]:
        """∇U and U at x, before this step; chains where the gradient is not finite stop."""
        leaf = x.detach().requires_grad_() if self.gradient.has_energy else x
        (grad,), u = self.gradient((leaf,), leaf, kwargs)
        self._stop(masks, step, grad)
        return (
            -grad if self.gradient.is_score else grad,
            None if u is None else self.gradient.sign * u,
        )

    def _stop(self, masks: tuple[Tensor, Tensor], step: int, values: Tensor) -> None:
        """Chains with a value that is not finite leave the mask."""
        if self.on_nonfinite != "ignore":
            mask_jointly(*masks, step, (values,))

    def _assign(self, target: Tensor, value: Tensor, active: Tensor) -> None:
        if self.on_nonfinite == "ignore":
            target.copy_(value)
        else:
            torch.where(per_chain_view(active, target), value, target, out=target)


def _record(
    stats: UnderdampedStatistics, step: int, u: Tensor | None, grad: Tensor, v: Tensor
) -> None:
    if stats.energy is not None and u is not None:
        stats.energy[step].copy_(u)
    stats.grad_norm[step].copy_(flat(grad).norm(dim=1))
    stats.kinetic[step].copy_(flat(v).to(stats.kinetic.dtype).square().sum(1) / 2)


def _exp(value: Coefficient) -> Coefficient:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def _at(value: Coefficient, step: int, x: Tensor) -> Coefficient:
    """The coefficient at a step, shaped to broadcast against x."""
    if not isinstance(value, Tensor):
        return value
    return per_chain_view(table_row(value, step), x).to(x.dtype)
