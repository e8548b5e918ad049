"""Underdamped Langevin dynamics with the BAOAB splitting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext._checks import check_choice, check_count, check_flag, check_number
from coopflow_ext._tensors import Coefficient, flat, per_chain_view, table_row
from coopflow_ext.rng import USE_MOMENTUM, Key
from coopflow_ext.samplers.chain import Chain, Inputs, Plan, clones, laid_out, mask_jointly, ran
from coopflow_ext.samplers.checks import (
    check_can_copy,
    check_can_read,
    check_chain_counts,
    check_constant,
    check_kwargs,
    check_like,
    check_state,
    check_steps,
)
from coopflow_ext.samplers.gradient import Gradient, StateFunction, constant, parameters_of
from coopflow_ext.samplers.graph import Replayed, can_capture, graphs_for
from coopflow_ext.samplers.inputs import normals_like, rng_tensors, state_copy
from coopflow_ext.samplers.output import State, Tensors, nonfinite_error, pack
from coopflow_ext.samplers.precision import casts_for
from coopflow_ext.samplers.records import Records
from coopflow_ext.samplers.schedule import (
    Schedule,
    chain_counts,
    coefficient,
    place,
    sqrt,
)

Mass = float | Tensor | list[Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True)
class UnderdampedStatistics:
    """At the end of each step, per chain, each (T, B).

    Attributes:
        energy: U; None with ``score=``.
        grad_norm: L2 norm of ∇U.
        kinetic: ½‖v‖², with a mass ½Σ m v².
    """

    energy: Tensor | None
    grad_norm: Tensor
    kinetic: Tensor


class UnderdampedOutput(NamedTuple):
    """See :class:`SamplerOutput`; ``velocity``, like x, continues the path with ``key``."""

    x: Any  # a State, as are trajectory and velocity
    key: Key
    trajectory: Any
    stats: UnderdampedStatistics | None
    velocity: Any


class UnderdampedLangevinSampler:
    """dx = v dt, dv = −m⁻¹∇U dt − γv dt + √(2γτ/m) dW, by the BAOAB splitting.

    One step of size h, with c = exp(−γh)::

        v -= h/2 · ∇U(x) / m;  x += h/2 · v
        v = c · v + √(τ(1 − c²)/m) · ξ
        x += h/2 · v;  v -= h/2 · ∇U(x) / m

    For U = λx²/2 the stationary variance of the position is exactly τ/λ for every h²λ < 4m.
    Leimkuhler and Matthews, J. Chem. Phys. 138 (2013).

    Args:
        energy, score, negative_energy: as in :class:`LangevinSampler`, also of several tensors.
        n_steps: number of steps T; each takes one gradient.
        step_size: h; a float, a callable of the step, (T,) or (T or 1, B or 1), as are the next.
        friction: γ ≥ 0.
        temperature: τ ≥ 0; p ∝ exp(−U/τ).
        mass: m > 0: a number, or a tensor that broadcasts to one chain's shape, of each element; of
            a state of several tensors one number for all, or a list of such tensors.
        return_trajectory, thin, stats: as in :class:`LangevinSampler`; ``stats`` are
            :class:`UnderdampedStatistics`.
        on_nonfinite: a chain whose gradient is not finite stays where that was found, one that
            would leave the finite numbers where it was; then "raise", "freeze" or "ignore" as in
            :class:`LangevinSampler`.
        autocast, compile, cuda_graph: as in :class:`LangevinSampler`.

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
        mass: Mass = 1.0,
        score: StateFunction | None = None,
        negative_energy: bool = False,
        return_trajectory: bool = False,
        thin: int = 1,
        stats: bool = False,
        on_nonfinite: Literal["raise", "freeze", "ignore"] = "raise",
        autocast: torch.dtype | None = None,
        compile: bool = False,
        cuda_graph: bool | Literal["auto"] = "auto",
    ) -> None:
        for name, flag in {
            "negative_energy": negative_energy,
            "return_trajectory": return_trajectory,
            "stats": stats,
            "compile": compile,
        }.items():
            check_flag(name, flag)
        n_steps = check_steps(n_steps)
        half_step = coefficient("step_size", step_size, n_steps) / 2
        gamma = coefficient("friction", friction, n_steps)
        tau = coefficient("temperature", temperature, n_steps)
        self.chain_counts = chain_counts(
            {"step_size": half_step, "friction": gamma, "temperature": tau}
        )
        keep = _exp(-2 * gamma * half_step)
        self.start_std = sqrt(tau)
        self.mass = _check_mass(mass)
        check_choice("on_nonfinite", on_nonfinite, ("raise", "freeze", "ignore"))
        self.on_nonfinite = on_nonfinite
        if autocast is not None:
            check_choice("autocast", autocast, (torch.bfloat16, torch.float16))
        check_choice("cuda_graph", cuda_graph, (True, False, "auto"))
        gradient = Gradient(energy, score, negative_energy=negative_energy, compile=compile)
        self.plan = UnderdampedPlan(
            gradient=gradient,
            n_steps=n_steps,
            coefficients={
                "step_size": half_step,
                "friction": keep,
                "noise": sqrt(tau * (1 - keep * keep)),
            },
            thin=check_count("thin", thin, 1),
            keep_trajectory=return_trajectory,
            keep_stats=stats,
            masked=on_nonfinite != "ignore",
            autocast=autocast,
            casts=casts_for(gradient, autocast),
            mass=self.mass,
        )
        self.cuda_graph = cuda_graph
        self._graphs = graphs_for(cuda_graph)

    def __call__(
        self,
        x0: State,
        *,
        key: Key | None = None,
        xi: State | None = None,
        velocity: State | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> UnderdampedOutput:
        """Run the chains from x0 (B, …), which is not modified; arguments as LangevinSampler's.

        Args:
            velocity: v at the start, like x0; by default drawn from N(0, τ/m) with the key.

        Raises:
            NonFiniteError: with on_nonfinite="raise", when a gradient or state is not finite.
            ValueError: also where that would have to be read from a stream that is being captured,
                and where mass does not fit x0.
        """
        xs = check_state(x0)
        check_chain_counts(self.chain_counts, len(xs[0]))
        if self.on_nonfinite == "raise":
            check_can_read(xs[0], "on_nonfinite='raise'", "; use 'freeze' or 'ignore'")
        key = Key.or_default(key)
        key.check_batch(len(xs[0]))
        after = key.advance(self.plan.n_steps)
        kwargs = check_kwargs(model_kwargs)
        grad_mode = self.plan.gradient.has_energy or torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad_mode):
            starts = tuple(state_copy(x) for x in xs)
            masses = masses_like(self.mass, starts)
            inputs = Inputs(
                like=x0,
                xs=starts,
                rngs=rng_tensors(key, xs),
                x_refs=None,
                xis=normals_like(xi, starts, self.plan.n_steps),
                model_kwargs=kwargs,
                velocities=self._velocities(velocity, starts, masses, key),
            )
            result = self._run_captured(inputs)
            if result is None:
                chain = ran(self.plan, inputs)
                self._check_finite(chain)
                assert inputs.velocities is not None
                result = chain.last, inputs.velocities, chain.records
        last, velocities, records = result
        trajectory = records.trajectory
        return UnderdampedOutput(
            pack(last, x0),
            after,
            None if trajectory is None else pack(trajectory, x0),
            _statistics(records, self.plan.gradient.sign),
            pack(velocities, x0),
        )

    def _can_capture(self, x: Tensor) -> bool:
        return can_capture(x, required=self.cuda_graph is True)

    def _run_captured(self, inputs: Inputs) -> tuple[Tensors, Tensors, Records] | None:
        """As CUDA graphs; None where there are none to be had."""
        if self._graphs is None or not self.plan.n_steps or not self._can_capture(inputs.xs[0]):
            return None
        with self._graphs.replayed(self.plan, inputs) as replayed:
            if replayed is None:
                return None
            self._check_finite(replayed)
            velocities = replayed.chain.inputs.velocities
            assert velocities is not None
            return clones(replayed.last), clones(velocities), replayed.records

    def _check_finite(self, chain: Chain | Replayed) -> None:
        """The one read of the mask."""
        if self.on_nonfinite != "raise" or not chain.stopped():
            return
        active, frozen_at = chain.active, chain.frozen_at
        assert active is not None
        assert frozen_at is not None
        advice = "use a smaller step or on_nonfinite='freeze'"
        what = "the gradient or state"
        raise nonfinite_error(active, frozen_at, chain.last, what=what, advice=advice)

    def _velocities(
        self, velocity: State | None, xs: Tensors, masses: Tensors | None, key: Key
    ) -> Tensors:
        if velocity is not None:
            given = check_like("velocity", velocity, xs)
            return tuple(laid_out(v.detach(), x) for v, x in zip(given, xs, strict=True))
        std = place("start_std", self.start_std, *xs)
        rngs = rng_tensors(key, xs, USE_MOMENTUM)
        drawn = [
            ops.langevin_noise_(torch.zeros_like(x), rng, noise=std)
            for x, rng in zip(xs, rngs, strict=True)
        ]
        if masses is None:
            return tuple(drawn)
        return tuple(v.div_(mass.sqrt()) for v, mass in zip(drawn, masses, strict=True))


@dataclass(frozen=True, kw_only=True)
class UnderdampedPlan(Plan):
    """Its ``coefficients`` are h/2, c and the noise of the middle step, before it is divided by the
    mass."""

    mass: Mass

    def chain(self, inputs: Inputs) -> UnderdampedChain:
        return UnderdampedChain(self, inputs)

    def records(self, xs: Tensors) -> Records:
        return self._records(xs, energy=self.gradient.has_energy, columns=2)


class UnderdampedChain(Chain):
    """T steps on fixed buffers, as :class:`Chain`, of positions ``xs`` and velocities ``vs``."""

    plan: UnderdampedPlan

    def __init__(self, plan: UnderdampedPlan, inputs: Inputs) -> None:
        super().__init__(plan, inputs)
        assert inputs.velocities is not None
        self.vs = inputs.velocities
        self.grads = clones(self.xs)  # at ``xs``
        self.masses = masses_like(plan.mass, self.xs)
        self.roots = None if self.masses is None else tuple(m.sqrt() for m in self.masses)

    def _bound_steps(self) -> list[ops.BoundStep]:
        return []  # the parts of a step are calls of their own

    def begin(self) -> None:
        super().begin()
        if self.plan.n_steps:
            with constant(parameters_of(self.gradient.module)), self.autocast():
                self._gradient(0)

    def run(self, n_steps: int, *, ends: bool) -> None:
        keeps = self.plan.keep_stats or self.plan.keep_trajectory
        with constant(parameters_of(self.gradient.module)), self.autocast():
            for step in range(n_steps):
                self._move(step)
                u = self._gradient(step + 1)
                kicked = [self._kicked(j, step) for j in range(len(self.xs))]
                self._assign(self.vs, tuple(kicked))
                if keeps:
                    self._record(step, u)

    def _move(self, step: int) -> None:
        """The first half of the kicks, and all that moves the positions."""
        moved, velocities = [], []
        for j, x in enumerate(self.xs):
            h, c = (self._at(name, step, x) for name in ("step_size", "friction"))
            v = self._kicked(j, step)
            x = x + h * v
            v = self._thermalised(j, step, c * v)
            x += h * v
            moved.append(x)
            velocities.append(v)
        self._stop(step, tuple(moved))  # which may overflow where the gradient was finite
        self._assign(self.xs, tuple(moved))
        self._assign(self.vs, tuple(velocities))
        for low, x in zip(self.lows, self.xs, strict=False):
            low.copy_(x)

    def _kicked(self, j: int, step: int) -> Tensor:
        grad = self.grads[j] if self.masses is None else self.grads[j] / self.masses[j]
        return self.vs[j] - self._at("step_size", step, self.xs[j]) * grad

    def _thermalised(self, j: int, step: int, v: Tensor) -> Tensor:
        """v with the noise of a step, which is that of √m·v."""
        if self.roots is not None:
            v = v * self.roots[j]
        v = ops.langevin_noise_(v, self.rngs[j], **self.noise_arguments(j, step))
        return v if self.roots is None else v / self.roots[j]

    def _at(self, name: str, step: int, x: Tensor) -> Coefficient:
        """A coefficient at a step, shaped to broadcast against x."""
        value = self.coefficients[name]
        if not isinstance(value, Tensor):
            return value
        return per_chain_view(table_row(value, step), x).to(x.dtype)

    def _gradient(self, step: int) -> Tensor | None:
        """Take ∇U at ``xs``, before this step, and U; chains where it is not finite stop."""
        grads, u = self.bound_gradient(self.inputs.model_kwargs)
        self._stop(step, grads)
        for kept, grad in zip(self.grads, grads, strict=True):
            kept.copy_(-grad if self.gradient.is_score else grad)
        return u

    def _stop(self, step: int, values: Tensors) -> None:
        """Chains with a value that is not finite leave the mask."""
        if self.active is not None and self.frozen_at is not None:
            mask_jointly(self.active, self.frozen_at, step, values)

    def _assign(self, targets: Tensors, values: Tensors) -> None:
        for target, value in zip(targets, values, strict=True):
            if self.active is None:
                target.copy_(value)
            else:
                chains = per_chain_view(self.active, target)
                torch.where(chains, value, target, out=target)

    def _record(self, step: int, u: Tensor | None) -> None:
        self.records.keep(step, self.xs, u)
        for sums in self.records.sums:
            grads = torch.cat([flat(grad).to(sums.dtype) for grad in self.grads], 1)
            scaled = self.vs
            if self.roots is not None:
                scaled = tuple(v * root for v, root in zip(self.vs, self.roots, strict=True))
            velocities = torch.cat([flat(v).to(sums.dtype) for v in scaled], 1)
            columns = grads.norm(dim=1), velocities.square().sum(1) / 2
            torch.stack(columns, dim=1, out=sums[step])


def _statistics(records: Records, sign: float) -> UnderdampedStatistics | None:
    if not records.sums:
        return None
    energies = None if records.energies is None else sign * records.energies
    return UnderdampedStatistics(energies, *records.sums[0].unbind(-1))


def _check_mass(mass: object) -> Mass:
    """m as it is given, tensors copied; TypeError or ValueError unless it is positive."""
    if isinstance(mass, (list, tuple)):
        return [_checked_mass(f"mass[{j}]", value) for j, value in enumerate(mass)]
    if isinstance(mass, Tensor):
        return _checked_mass("mass", mass)
    return check_number("mass", mass, minimum=0.0, exclusive=True)


def _checked_mass(name: str, mass: object) -> Tensor:
    check_constant(name, mass)
    if not isinstance(mass, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mass).__name__}")
    if mass.is_complex() or mass.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got {mass.dtype}")
    if not bool((mass.isfinite() & (mass > 0)).all()):
        raise ValueError(f"{name} must be finite and > 0 in every element")
    return mass.detach().to("cpu", torch.float64, copy=True)


def masses_like(mass: Mass, xs: Tensors) -> Tensors | None:
    """m for each tensor of a state, in its dtype and on its device; None where it is 1.

    Raises:
        ValueError: it does not fit.
    """
    if not isinstance(mass, (Tensor, list, tuple)):
        if mass == 1:
            return None
        mass = [torch.tensor(mass, dtype=torch.float64, device="cpu")] * len(xs)
    masses = (mass,) if isinstance(mass, Tensor) else tuple(mass)
    if len(masses) != len(xs):
        raise ValueError(f"mass must have {len(xs)} tensor(s), like x0, got {len(masses)}")
    for value, x in zip(masses, xs, strict=True):
        shape = x.shape[1:]
        fits = value.ndim <= len(shape) and all(
            mine in (1, theirs)
            for mine, theirs in zip(value.shape[::-1], shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"mass must broadcast to one chain's shape {tuple(shape)}, "
                f"got shape {tuple(value.shape)}"
            )
        # On the host, where it was given: what is 0 or infinite in the state's dtype.
        if not bool((value.to(x.dtype) > 0).all() & value.to(x.dtype).isfinite().all()):
            raise ValueError(f"mass must be finite and > 0 in {x.dtype}, that of x0")
    return tuple(map(_mass_like, masses, xs))


def _mass_like(mass: Tensor, x: Tensor) -> Tensor:
    if mass.ndim == 0:
        return x.new_full((), mass.item())
    check_can_copy("mass", mass, x)
    return mass.to(x.device, x.dtype, non_blocking=True)


def _exp(value: Coefficient) -> Coefficient:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)
