"""The loop of a Langevin chain and the buffers that it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext._tensors import (
    Coefficient,
    arithmetic_dtype,
    flat,
    norm_scale,
    per_chain_view,
    safe_sqrt,
    table_row,
)
from coopflow_ext.samplers.gradient import Gradient, constant, parameters_of
from coopflow_ext.samplers.nested import map_tensors, tensors_of
from coopflow_ext.samplers.output import ChainStatistics, State, Tensors, chain_statistics, pack
from coopflow_ext.samplers.precision import CastModels
from coopflow_ext.samplers.schedule import place

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """A sampler's options, checked, in the form that the loop needs."""

    gradient: Gradient
    n_steps: int
    fast_steps: int  # steps of the in-place loop; the rest is differentiable
    coefficients: Mapping[str, Coefficient]  # drift, noise, decay, pull
    clips: Mapping[str, float]  # those of grad_clip, grad_norm, step_clip that are on
    step_clamp: Bounds | None  # of the state after every step
    end_clamp: Bounds | None  # after the last
    noise_clamp: Bounds | None  # after the noise that comes before the gradient
    noise_first: bool
    thin: int
    keep_trajectory: bool
    keep_stats: bool
    masked: bool
    autocast: torch.dtype | None
    channels_last: bool
    casts: CastModels | None  # where the model computes with copies of its weights

    def records(self, step: int) -> bool:
        """Whether the state after this step goes into the trajectory."""
        return self.keep_trajectory and (step + 1) % self.thin == 0


@dataclass(frozen=True)
class Inputs:
    """What a chain is given at a call. All tensors of a state's layout where they have its shape.

    Attributes:
        like: a state whose structure (tensor, list, tuple) the energy is given.
        xs: the start.
        rngs: int64[3] for each tensor of the state.
        x_refs: centres of the pull, or None.
        xis: supplied normals for each tensor and step, or None.
        model_kwargs: further arguments of the energy.
    """

    like: State
    xs: Tensors
    rngs: Tensors
    x_refs: Tensors | None
    xis: tuple[Tensors, ...] | None
    model_kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """Every tensor among the inputs, always in the same order."""
        rows = [row for rows in self.xis or () for row in rows]
        kwargs = tensors_of(self.model_kwargs)
        return [*self.xs, *self.rngs, *(self.x_refs or ()), *rows, *kwargs]

    def clone(self) -> Inputs:
        """The same values in tensors of its own."""
        return replace(
            self,
            xs=clones(self.xs),
            rngs=clones(self.rngs),
            x_refs=None if self.x_refs is None else clones(self.x_refs),
            xis=None if self.xis is None else tuple(map(clones, self.xis)),
            model_kwargs=map_tensors(Tensor.clone, self.model_kwargs),
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
        # Leaves share storage; a step's autograd graph is gone before they are overwritten.
        differentiate = plan.gradient.has_energy and plan.fast_steps > 0
        self.leaves = tuple(
            x.detach().requires_grad_() if differentiate else x for x in self.lows or xs
        )
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
                # A frozen chain must not keep noise that no step has used.
                self.settled = tuple(torch.empty_like(x) for x in xs)

        self.trajectory: Tensors | None = None
        if plan.keep_trajectory:
            kept = plan.n_steps // plan.thin
            self.trajectory = tuple(x.new_empty(kept, *x.shape) for x in xs)
        self.sums: Tensors = ()
        self.energies: Tensor | None = None
        if plan.keep_stats:
            shape = plan.n_steps, batch
            self.sums = tuple(x.new_empty(*shape, 5, dtype=arithmetic_dtype(x.dtype)) for x in xs)
            if plan.gradient.has_energy:
                wide = torch.float64 if torch.float64 in (x.dtype for x in xs) else torch.float32
                self.energies = first.new_empty(*shape, dtype=wide)

        self.bound_gradient = partial(
            self.gradient,
            self.leaves,
            self.leaf_state,
            inputs.model_kwargs,
            wants_energy=self.energies is not None,
            ones={},  # kept by the chain, since a captured one goes on reading them
        )
        self.steps = [self._bound_step(j) for j in range(len(xs))]
        self.moves = [
            step.in_place(x, rng) for step, x, rng in zip(self.steps, xs, self.rngs, strict=True)
        ]
        self.varies = bool(plan.noise_first or plan.keep_stats or plan.end_clamp or inputs.xis)
        self.noise_calls = [self._noise_arguments(j) for j in range(len(xs))]

    def load(self, inputs: Inputs) -> None:
        """Take another call's inputs, alike in shape and kind, into this chain's tensors."""
        for mine, given in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
            mine.copy_(given)

    def noise_when(self, step: int) -> int:
        """0: with the update; 1: the next step's after it; 2: none, or added apart from it."""
        plan = self.plan
        if not plan.noise_first:
            return 0
        last = step + 1 >= plan.fast_steps  # beyond, differentiable steps add it themselves
        apart = self.settled is not None or plan.noise_clamp is not None or plan.records(step)
        return 2 if last or apart else 1

    def _bound_step(self, j: int) -> ops.BoundStep:
        """What every step of tensor j has. Most chains have nothing else."""
        plan, x = self.plan, self.xs[j]
        several = len(self.xs) > 1  # which stop as one, before any of them moves
        return ops.BoundStep(
            **{name: place(value, x) for name, value in plan.coefficients.items()},
            **plan.clips,
            x_ref=None if self.inputs.x_refs is None else self.inputs.x_refs[j],
            is_score=plan.gradient.is_score,
            clamp=plan.step_clamp,
            x_low=self.lows[j] if self.lows else None,
            active=self.active,
            freeze_nonfinite=plan.masked and not several,
            frozen_at=None if several else self.frozen_at,
        )

    def _varying(self, j: int, step: int) -> dict[str, Any]:
        """What a step of tensor j has beside."""
        plan, xis = self.plan, self.inputs.xis
        varying: dict[str, Any] = {}
        if plan.noise_first:
            varying["noise_when"] = self.noise_when(step)
        if xis is not None:
            varying["xi"] = xis[j][step + (self.noise_when(step) == 1)]
        if plan.keep_stats:
            varying["stats"] = self.sums[j][step]
        if plan.end_clamp is not None and step + 1 == plan.n_steps:
            varying["clamp"] = plan.end_clamp
        return varying

    def functional_step(self, j: int, step: int, x: Tensor, grad: Tensor, **given: Any) -> Tensor:
        """Tensor j after a step, as a function of x and grad; its noise is the step's own."""
        varying = {**self._varying(j, step), **given}
        varying["noise_when"] = 2 if self.plan.noise_first else 0
        return self.steps[j].functional(x, grad, self.rngs[j], step, **varying)

    def _noise_arguments(self, j: int) -> list[dict[str, Any]]:
        """Keyword arguments of ``ops.langevin_noise_`` for tensor j, one dict for each step."""
        if not self.plan.noise_first:
            return []
        xis = self.inputs.xis
        common: dict[str, Any] = {
            "noise": place(self.plan.coefficients["noise"], self.xs[j]),
        }
        if self.active is not None:
            common["active"] = self.active
        return [
            {**common, "step": step, "xi": None if xis is None else xis[j][step]}
            for step in range(self.plan.n_steps)
        ]

    def run(self, n_steps: int | None = None) -> None:
        """The in-place loop on ``xs``: all its steps, or the first ``n_steps`` to warm up."""
        plan = self.plan
        end = plan.fast_steps if n_steps is None else min(n_steps, plan.fast_steps)
        records = plan.keep_stats or plan.keep_trajectory
        self._begin()
        with constant(parameters_of(self.gradient.module)), self.autocast():
            if plan.noise_first and end:
                self._add_noise(0)
            for step in range(end):
                grads, u = self.bound_gradient()
                self.update(step, grads)
                if self.settled is not None:
                    self._settle()
                if records:
                    self._record(step, u)
                if plan.noise_first and step + 1 < end and self.noise_when(step) == 2:
                    self._add_noise(step + 1)
        if self.settled is not None:
            for x, settled in zip(self.xs, self.settled, strict=True):
                x.copy_(settled)

    def _begin(self) -> None:
        if self.active is not None and self.frozen_at is not None:
            self.active.fill_(True)
            self.frozen_at.fill_(self.plan.n_steps)
        for copies in filter(None, (self.lows, self.settled)):
            for copy, x in zip(copies, self.xs, strict=True):
                copy.copy_(x)
        if self.cast is not None:
            self.cast.refresh()

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
        dtype = self.plan.autocast
        if dtype is None:
            return nullcontext()
        # Without autocast's cache of casts, which must not outlive a graph's capture.
        return torch.autocast(self.xs[0].device.type, dtype, cache_enabled=False)

    def update(self, step: int, grads: Tensors) -> None:
        """Move ``xs`` by one step, given the gradients."""
        if len(grads) == 1:  # nearly every chain, and a call of it costs what its calls cost
            x, grad = self.xs[0], grads[0]
            if grad.dtype != x.dtype:
                grad = _in_a_dtype_for(grad, x)
            if self.varies:
                self.moves[0](grad, step, **self._varying(0, step))
            else:
                self.moves[0](grad, step)
            return
        grads = tuple(map(_in_a_dtype_for, grads, self.xs))
        if self.active is not None and self.frozen_at is not None:
            mask_jointly(self.active, self.frozen_at, step, grads)
        shrink = joint_norm_scale(self.plan.clips, grads)
        for j, grad in enumerate(grads):
            if shrink is None:
                self._move(j, step, grad)
                continue
            # The drift takes the factor: a table of one row.
            drift = self.steps[j].drift
            row = table_row(drift, step) if isinstance(drift, Tensor) else drift
            self._move(j, step, grad, drift=(row * shrink)[None], grad_norm=None)

    def _move(self, j: int, step: int, grad: Tensor, **given: Any) -> None:
        given = {**self._varying(j, step), **given}
        self.moves[j](grad, step, **given)

    def _settle(self) -> None:
        assert self.active is not None
        assert self.settled is not None
        for x, settled in zip(self.xs, self.settled, strict=True):
            torch.where(per_chain_view(self.active, x), x, settled, out=settled)

    def _record(self, step: int, u: Tensor | None) -> None:
        if self.energies is not None and u is not None:
            self.energies[step].copy_(u)
        if self.trajectory is not None and self.plan.records(step):
            states = self.xs if self.settled is None else self.settled
            for kept, x in zip(self.trajectory, states, strict=True):
                kept[(step + 1) // self.plan.thin - 1].copy_(x)

    def _add_noise(self, step: int) -> None:
        for j, x in enumerate(self.xs):
            ops.langevin_noise_(x, self.rngs[j], **self.noise_calls[j][step])
            if self.plan.noise_clamp is not None:
                x.clamp_(*self.plan.noise_clamp)
            if self.lows:
                self.lows[j].copy_(x)

    def statistics(self) -> ChainStatistics | None:
        """The recorded sums as norms and fractions over the whole state."""
        if not self.plan.keep_stats:
            return None
        return chain_statistics(
            torch.stack(self.sums).sum(0),
            None if self.energies is None else self.plan.gradient.sign * self.energies,
            n_elements=sum(x[:1].numel() for x in self.xs),
        )


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
    norm = safe_sqrt(torch.stack([row.square().sum(1) for row in rows]).sum(0))
    return norm_scale(norm, limit)
