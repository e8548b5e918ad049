"""The loop of a Langevin chain and the buffers that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext._tensors import (
    Coefficient,
    apart_from,
    arithmetic_dtype,
    flat,
    leaf_of,
    norm_scale,
    per_chain_view,
    storages,
    table_row,
)
from coopflow_ext.autocast import uncached_casts
from coopflow_ext.samplers.checks import check_like
from coopflow_ext.samplers.gradient import Gradient, constant, parameters_of
from coopflow_ext.samplers.inputs import first_rows, step_rows
from coopflow_ext.samplers.nested import map_tensors, tensors_of
from coopflow_ext.samplers.output import ChainStatistics, State, Tensors, pack, unpack
from coopflow_ext.samplers.precision import CastModels
from coopflow_ext.samplers.records import Records
from coopflow_ext.samplers.schedule import place
from coopflow_ext.samplers.step_rules import RuleOptions, StepRules

Bounds = tuple[float, float]

AfterStep = Callable[[Any, Tensor], Any]
"""(x, step) → x, or None where it has changed x in place; step is a 0-d int64 tensor."""


@dataclass(frozen=True)
class Plan:
    """A sampler's options, checked, in the form that the loop needs."""

    gradient: Gradient
    n_steps: int
    coefficients: Mapping[str, Coefficient]  # drift, noise, decay, pull; or snr
    thin: int
    keep_trajectory: bool
    keep_stats: bool
    masked: bool
    autocast: torch.dtype | None
    casts: CastModels | None  # where the model computes with copies of its weights
    differentiable: bool | Literal["last"] = False
    # Those of grad_clip, grad_norm, step_clip that are on.
    clips: Mapping[str, float] = field(default_factory=dict)
    step_clamp: Bounds | None = None  # of the state after every step
    end_clamp: Bounds | None = None  # after the last
    noise_clamp: Bounds | None = None  # after the noise that comes before the gradient
    noise_first: bool = False
    channels_last: bool = False
    keep_start: bool = False  # as the first state of the trajectory
    after_step: AfterStep | None = None
    rules: RuleOptions | None = None  # where a step is not that of the op alone

    @property
    def fast_steps(self) -> int:
        """Steps of the in-place loop; the rest is differentiable."""
        if self.differentiable == "last":
            return max(self.n_steps - 1, 0)
        return 0 if self.differentiable else self.n_steps

    def chain(self, inputs: Inputs) -> Chain:
        """What makes its steps."""
        return Chain(self, inputs)

    def keeps_state(self, step: int) -> bool:
        """Whether the state after this step goes into the trajectory."""
        return self.keep_trajectory and (step + 1) % self.thin == 0

    def records(self, xs: Tensors) -> Records:
        """Memory for what its steps leave behind."""
        return self._records(xs, energy=self.gradient.has_energy)

    def _records(self, xs: Tensors, *, energy: bool, columns: int | None = None) -> Records:
        return Records(
            xs,
            self.n_steps,
            thin=self.thin if self.keep_trajectory else None,
            start=self.keep_start,
            stats=self.keep_stats,
            energy=energy,
            columns=columns,
        )


@dataclass(frozen=True)
class Inputs:
    """What a chain is given at a call. All tensors of a state's layout where they have its shape.

    Attributes:
        like: a state whose structure (tensor, list, tuple) the energy is given.
        xs: the start.
        rngs: int64[3] for each tensor of the state, and those of other uses after them.
        x_refs: centres of the pull, or None.
        xis: supplied normals for each tensor, (T, …) with a row for each step, or None.
        model_kwargs: further arguments of the energy.
        step_kwargs: those that differ from step to step, (T, …) with a row for each.
        step_numbers: (T,), where a plan's ``after_step`` is told them.
        velocities: of each tensor at the start, or None; like ``xs`` overwritten.
    """

    like: State
    xs: Tensors
    rngs: Tensors
    x_refs: Tensors | None
    xis: Tensors | None
    model_kwargs: dict[str, Any]
    step_kwargs: dict[str, Tensor] = field(default_factory=dict)
    step_numbers: Tensor | None = None
    velocities: Tensors | None = None

    def constants(self) -> list[Tensor]:
        """Every tensor of which the whole chain has one, always in the same order."""
        kwargs = tensors_of(self.model_kwargs)
        return [*self.xs, *self.rngs, *(self.x_refs or ()), *(self.velocities or ()), *kwargs]

    def rows(self) -> list[Tensor]:
        """Every tensor of which a step has a row, always in the same order."""
        numbers = () if self.step_numbers is None else (self.step_numbers,)
        return [*(self.xis or ()), *self.step_kwargs.values(), *numbers]

    def window(self, n_steps: int) -> Inputs:
        """The same constants in tensors of its own, and room for the rows of so many steps."""
        xis = None
        if self.xis is not None:
            xis = tuple(step_rows(x, n_steps).zero_() for x in self.xs)
        return replace(
            self,
            xs=clones(self.xs),
            rngs=clones(self.rngs),
            x_refs=None if self.x_refs is None else clones(self.x_refs),
            xis=xis,
            model_kwargs=map_tensors(Tensor.clone, self.model_kwargs),
            step_kwargs={name: first_rows(v, n_steps) for name, v in self.step_kwargs.items()},
            step_numbers=None
            if self.step_numbers is None
            else first_rows(self.step_numbers, n_steps),
            velocities=None if self.velocities is None else clones(self.velocities),
        )


def _in_a_dtype_for(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient, which the op takes in x's dtype or, beside a wider x, in half precision."""
    if grad.dtype == x.dtype or (grad.dtype.itemsize == 2 and x.dtype.itemsize > 2):
        return grad
    return grad.to(x.dtype)


def clones(tensors: Tensors) -> Tensors:
    """Each tensor in memory of its own, same layout."""
    return tuple(t.clone() for t in tensors)


def laid_out(value: Tensor, x: Tensor) -> Tensor:
    """A copy of ``value`` with x's dtype, device and memory layout; gradients flow through."""
    return torch.empty_like(x, requires_grad=False).copy_(value)


class Chain:
    """T steps on fixed buffers. After construction the loop itself allocates nothing and the host
    reads nothing, so :meth:`run` can be captured in a CUDA graph and replayed.

    The chain owns the tensors of ``inputs`` and overwrites ``inputs.xs``.
    """

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self.plan, self.inputs = plan, inputs
        self.xs = xs = inputs.xs
        self.rngs = inputs.rngs
        first, batch = xs[0], xs[0].shape[0]
        # The model reads x itself, or with autocast a copy that the update keeps up to date.
        dtype = plan.autocast
        self.lows = tuple(torch.empty_like(x, dtype=dtype) for x in xs) if dtype else ()
        # Of what is learned, the values; a differentiable chain has the rest.
        placed = {name: place(name, v, *xs) for name, v in plan.coefficients.items()}
        self.coefficients = {
            name: v.detach() if isinstance(v, Tensor) else v for name, v in placed.items()
        }
        self.rules: StepRules | None = None
        if plan.rules is not None:
            is_score = plan.gradient.is_score
            self.rules = StepRules(plan.rules, xs, self.coefficients, is_score=is_score, low=dtype)
            self.coefficients = self.rules.coefficients
            self.lows = () if self.rules.points else self.lows
        read = self.lows or (self.rules.points if self.rules else ()) or xs
        # Leaves share storage; a step's autograd graph is gone before they are overwritten.
        differentiate = plan.gradient.has_energy and plan.fast_steps > 0
        self.leaves = tuple(leaf_of(x) if differentiate else x for x in read)
        self.leaf_state = pack(self.leaves, inputs.like)
        self.cast = None if plan.casts is None else plan.casts.take()
        self.gradient = plan.gradient if self.cast is None else self.cast.gradient

        self.active: Tensor | None = None
        self.frozen_at: Tensor | None = None  # step at which a chain left the mask
        self.settled: Tensors | None = None
        if plan.masked:
            self.active = first.new_empty(batch, dtype=torch.bool)
            self.frozen_at = first.new_empty(batch, dtype=torch.int64)
            if plan.noise_first:
                # A frozen chain must not end with noise that no step has used.
                self.settled = tuple(torch.empty_like(x) for x in xs)

        self.records = plan.records(xs)
        self.bound_gradient = partial(
            self.gradient,
            self.leaves,
            self.leaf_state,
            wants_energy=self.records.energies is not None,
            ones={},  # kept by the chain, since a captured one goes on reading them
        )
        self.steps = self._bound_steps()
        self.moves: dict[tuple[int, bool], list[Callable[[Tensor, int], None]]] = {}
        # Several tensors move one by one, and a score may hand out the state's own.
        self.written = storages((*xs, *self.lows)) if len(xs) > 1 else set()
        # The drift of all tensors times the factor that shrinks their joint gradient.
        self.shrunk_drift: Tensor | None = None
        if len(xs) > 1 and "grad_norm" in plan.clips:
            self.shrunk_drift = first.new_empty(1, batch, dtype=torch.float64)

    @property
    def last(self) -> Tensors:
        """The state after the last step."""
        return self.xs if self.settled is None else self.settled

    def noise_when(self, step: int, *, pauses: bool) -> int:
        """0: with the update; 1: the next step's after it; 2: none, or added apart from it, also
        where the loop pauses after this step."""
        plan = self.plan
        if not plan.noise_first:
            return 0
        apart = (
            self.settled is not None
            or plan.noise_clamp is not None
            or plan.after_step is not None
            or plan.rules is not None
            or plan.keeps_state(step)
        )
        return 2 if pauses or apart else 1

    def _bound_steps(self) -> list[ops.BoundStep]:
        return [self._bound_step(j) for j in range(len(self.xs))]

    def _bound_step(self, j: int) -> ops.BoundStep:
        """What every step of tensor j has."""
        plan = self.plan
        several = len(self.xs) > 1  # which stop as one, before any of them moves
        return ops.BoundStep(
            **self.coefficients,
            **plan.clips,
            x_ref=None if self.inputs.x_refs is None else self.inputs.x_refs[j],
            is_score=plan.gradient.is_score,
            clamp=plan.step_clamp,
            xi=self._normals(j),
            stats=self.records.sums[j] if plan.keep_stats else None,
            x_low=self.lows[j] if self.lows else None,
            active=self.active,
            freeze_nonfinite=plan.masked and not several,
            frozen_at=None if several else self.frozen_at,
        )

    def _normals(self, j: int) -> Tensor | None:
        """A row of normals for each step of tensor j; None where the op draws them."""
        if self.rules is not None and self.rules.noises:
            noise = self.rules.noises[j]
            return noise.expand(self.plan.n_steps, *noise.shape)
        return None if self.inputs.xis is None else self.inputs.xis[j]

    def arguments(self, step: int) -> dict[str, Any]:
        """What the energy is given beside the state."""
        rows = {name: row[step] for name, row in self.inputs.step_kwargs.items()}
        return {**self.inputs.model_kwargs, **rows}

    def _varying(self, noise_when: int, *, ends: bool) -> dict[str, Any]:
        """What differs between steps; ``ends``: it is the chain's last."""
        end_clamp = self.plan.end_clamp
        clamp = {"clamp": end_clamp} if ends and end_clamp is not None else {}
        return {"noise_when": noise_when, **clamp}

    def _bind(self, noise_when: int, *, ends: bool) -> list[Callable[[Tensor, int], None]]:
        """The steps of this kind in place, one for each tensor."""
        varying = self._varying(noise_when, ends=ends)
        if self.shrunk_drift is not None:
            varying.update(drift=self.shrunk_drift, grad_norm=None)
        tensors = zip(self.steps, self.xs, self.rngs, strict=True)
        moves = [step.in_place(x, rng, **varying) for step, x, rng in tensors]
        self.moves[noise_when, ends] = moves
        return moves

    def functional_step(self, j: int, step: int, x: Tensor, grad: Tensor, **given: Any) -> Tensor:
        """Tensor j after a step, as a function of x and grad; its noise is the step's own."""
        when = self.noise_when(step, pauses=True)
        varying = self._varying(when, ends=step + 1 == self.plan.n_steps)
        return self.steps[j].functional(x, grad, self.rngs[j], step, **{**varying, **given})

    def noise_arguments(self, j: int, step: int) -> dict[str, Any]:
        """Keyword arguments of ``ops.langevin_noise_`` for tensor j, all but the mask."""
        xis = self._normals(j)
        xi = None if xis is None else xis[step]
        return {"noise": self.coefficients["noise"], "step": step, "xi": xi}

    def run(self, n_steps: int, *, ends: bool) -> None:
        """The next steps in place on ``xs``, of which the chain knows as its first.

        Args:
            n_steps: how many.
            ends: whether the chain is over after them.
        """
        noise_first = noise_to_come = self.plan.noise_first
        records = self.plan.keep_stats or self.plan.keep_trajectory
        given, by_step = self.inputs.model_kwargs, bool(self.inputs.step_kwargs)
        rules, follows = self.rules, self.plan.after_step is not None
        with constant(parameters_of(self.gradient.module)), self.autocast():
            for step in range(n_steps):
                if noise_to_come:
                    self._add_noise(step)
                if rules is not None:
                    rules.look_ahead(step)
                grads, u = self.bound_gradient(self.arguments(step) if by_step else given)
                is_last = step + 1 == n_steps
                when = self.noise_when(step, pauses=is_last) if noise_first else 0
                self.update(step, grads, noise_when=when, ends=ends and is_last)
                if follows:
                    self._follow(step)
                noise_to_come = when == 2
                if self.settled is not None:
                    self._settle()
                if records:
                    self.records.keep(step, self.last, u)

    def begin(self) -> None:
        """Before the first step: everything that follows from ``xs`` and from the weights."""
        if self.active is not None and self.frozen_at is not None:
            self.active.fill_(True)
            self.frozen_at.fill_(self.plan.n_steps)
        for copies in filter(None, (self.lows, self.settled)):
            for copy, x in zip(copies, self.xs, strict=True):
                copy.copy_(x)
        if self.cast is not None:
            self.cast.refresh()
        if self.rules is not None:
            self.rules.begin()

    def stopped(self) -> bool:
        """Whether a chain has met a gradient that is not finite: one read."""
        return self.active is not None and not bool(self.active.all())

    def release(self) -> None:
        """The chain is over. Another may have the model, if it was a copy of the caller's."""
        if self.cast is not None and self.plan.casts is not None:
            self.plan.casts.give_back(self.cast)
            self.cast = None

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the model computes in."""
        dtype, device = self.plan.autocast, self.xs[0].device.type
        if dtype is None:  # the caller's, which would keep the cast of a state that moves in place
            return uncached_casts(device)
        if not torch.amp.is_autocast_available(device):
            raise ValueError(f"autocast: torch has none on the device of x0, which is {device!r}")
        # Without autocast's cache of casts, which must not outlive a graph's capture.
        return torch.autocast(device, dtype, cache_enabled=False)

    def update(self, step: int, grads: Tensors, *, noise_when: int, ends: bool) -> None:
        """Move ``xs`` by one step, given the gradients."""
        if self.rules is not None:
            if not self.plan.noise_first:
                self.rules.draw(step, self.rngs, self.inputs.xis)
            grads = self.rules.gradients(step, grads)
        moves = self.moves.get((noise_when, ends)) or self._bind(noise_when, ends=ends)
        if len(grads) == 1:  # nearly every chain, and a call of it costs what its calls cost
            grad, x = grads[0], self.xs[0]
            moves[0](grad if grad.dtype == x.dtype else _in_a_dtype_for(grad, x), step)
            return
        grads = tuple(map(_in_a_dtype_for, apart_from(self.written, grads), self.xs))
        if self.active is not None and self.frozen_at is not None:
            mask_jointly(self.active, self.frozen_at, step, grads)
        shrink = joint_norm_scale(self.plan.clips, grads)
        if shrink is not None and self.shrunk_drift is not None:
            drift = self.coefficients["drift"]
            row = table_row(drift, step) if isinstance(drift, Tensor) else drift
            self.shrunk_drift.copy_(row * shrink)
        for move, grad in zip(moves, grads, strict=True):
            move(grad, step)

    def followed(self, xs: Tensors, step: int) -> Tensors:
        """The state ``xs``, in its dtypes, as ``after_step`` leaves it; ``xs`` itself is not
        touched."""
        assert self.plan.after_step is not None
        assert self.inputs.step_numbers is not None
        given = pack(clones(xs), self.inputs.like)
        device, number = xs[0].device.type, self.inputs.step_numbers[step]
        with torch.autocast(device, enabled=False) if self.plan.autocast else nullcontext():
            new = self.plan.after_step(given, number)
        if new is None:
            return unpack(given)
        if not isinstance(new, (Tensor, list, tuple)):
            raise TypeError(f"after_step must return x or None, got {type(new).__name__}")
        found = check_like("what after_step returns", new, xs)
        return tuple(value.to(x.dtype) for value, x in zip(found, xs, strict=True))

    def _follow(self, step: int) -> None:
        """``after_step`` on the chains that have not stopped."""
        with torch.no_grad():
            for x, new in zip(self.xs, self.followed(self.xs, step), strict=True):
                if self.active is not None:
                    new = torch.where(per_chain_view(self.active, x), new, x)
                x.copy_(new)
            for low, x in zip(self.lows, self.xs, strict=False):
                low.copy_(x)

    def _settle(self) -> None:
        assert self.active is not None
        assert self.settled is not None
        for x, settled in zip(self.xs, self.settled, strict=True):
            torch.where(per_chain_view(self.active, x), x, settled, out=settled)

    def _add_noise(self, step: int) -> None:
        if self.rules is not None:
            self.rules.draw(step, self.rngs, self.inputs.xis)
        for j, x in enumerate(self.xs):
            ops.langevin_noise_(
                x, self.rngs[j], **self.noise_arguments(j, step), active=self.active
            )
            if self.plan.noise_clamp is not None:
                x.clamp_(*self.plan.noise_clamp)
            if self.lows:
                self.lows[j].copy_(x)

    def statistics(self) -> ChainStatistics | None:
        """The recorded sums as norms and fractions over the whole state."""
        return self.records.statistics(self.plan.gradient.sign)


def mask_jointly(active: Tensor, frozen_at: Tensor, step: int, grads: Tensors) -> None:
    """A chain of several tensors stops as a whole, before any of them moves."""
    finite = torch.stack([flat(grad).isfinite().all(1) for grad in grads]).all(0)
    frozen_at.masked_fill_(active & ~finite, step)
    active &= finite


def joint_norm_scale(clips: Mapping[str, float], grads: Tensors) -> Tensor | None:
    """Factor (B,) that brings the norm over all tensors of a chain to at most grad_norm."""
    limit, clip = clips.get("grad_norm"), clips.get("grad_clip")
    if limit is None:
        return None
    rows = [flat(grad).to(arithmetic_dtype(grad.dtype)) for grad in grads]
    if clip is not None:
        rows = [row.clamp(-clip, clip) for row in rows]
    return norm_scale(rows, limit)


def ran(plan: Plan, inputs: Inputs) -> Chain:
    """A chain after its steps in place."""
    chain = plan.chain(inputs)
    try:
        chain.begin()
        chain.run(plan.fast_steps, ends=plan.fast_steps == plan.n_steps)
    finally:
        chain.release()
    return chain
