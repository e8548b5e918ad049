"""The loop of a Langevin chain and the buffers that it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext.samplers.gradient import Gradient, Tensors
from coopflow_ext.samplers.output import ChainStatistics, State
from coopflow_ext.samplers.schedule import Coefficient, place


@dataclass(frozen=True)
class Plan:
    """A sampler's options, checked, in the form that the loop needs."""

    gradient: Gradient
    n_steps: int
    coefficients: Mapping[str, Coefficient]  # drift, noise, decay, pull
    clips: Mapping[str, float]  # those of grad_clip, grad_norm, step_clip that are on
    clamp: tuple[float, float] | None
    clamp_at_end: bool
    noise_first: bool
    thin: int
    keep_trajectory: bool
    keep_stats: bool
    masked: bool

    def clamp_at(self, step: int) -> tuple[float, float] | None:
        return None if self.clamp_at_end and step + 1 < self.n_steps else self.clamp

    def records(self, step: int) -> bool:
        """Whether the state after this step goes into the trajectory."""
        return self.keep_trajectory and (step + 1) % self.thin == 0


def pack(xs: Sequence[Tensor], like: State) -> State:
    """Tensors in the structure (tensor, list or tuple) of ``like``."""
    if isinstance(like, Tensor):
        return xs[0]
    return list(xs) if isinstance(like, list) else tuple(xs)


def unpack(state: State) -> Tensors:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def per_chain_view(values: Tensor, x: Tensor) -> Tensor:
    """(B,) shaped to broadcast against x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


class Chain:
    """One run of T steps on fixed buffers: after construction nothing is allocated by the loop
    itself and nothing is read by the host, so that :meth:`run` can be captured in a CUDA graph.

    Args:
        plan: the sampler's options.
        xs: the start, tensors that this chain may overwrite.
        rngs: int64[2] for each tensor of the state.
        like: a state whose structure the energy is given.
        x_refs: centres of the pull, or None.
        xis: supplied normals for each tensor and step, or None.
    """

    def __init__(
        self,
        plan: Plan,
        xs: Tensors,
        rngs: Tensors,
        *,
        like: State,
        x_refs: Tensors | None,
        xis: tuple[Tensors, ...] | None,
        chain_offset: int,
        model_kwargs: Mapping[str, Any],
    ) -> None:
        self.plan, self.xs, self.rngs = plan, xs, rngs
        self.model_kwargs = model_kwargs
        first, batch = xs[0], xs[0].shape[0]
        # Leaves share x's storage; a step's autograd graph is gone before x is overwritten.
        differentiate = plan.gradient.has_energy
        self.leaves = tuple(x.detach().requires_grad_() if differentiate else x for x in xs)
        self.leaf_state = pack(self.leaves, like)
        self.grad_buffers: list[Tensor | None] = [None] * len(xs)

        self.active: Tensor | None = None
        self.steps_alive: Tensor | None = None
        self.settled: Tensors | None = None
        if plan.masked:
            self.active = first.new_ones(batch, dtype=torch.bool)
            self.steps_alive = first.new_zeros(batch, dtype=torch.int64)
            if plan.noise_first:
                # A frozen chain must not keep noise that no step has used.
                self.settled = tuple(x.clone() for x in xs)

        self.trajectory: Tensors | None = None
        if plan.keep_trajectory:
            kept = plan.n_steps // plan.thin
            self.trajectory = tuple(x.new_empty(kept, *x.shape) for x in xs)
        self.sums: tuple[Tensor, ...] = ()
        self.energies: Tensor | None = None
        if plan.keep_stats:
            dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
            empty = first.new_empty
            self.sums = tuple(empty(plan.n_steps, batch, 5, dtype=dtype) for _ in xs)
            if plan.gradient.has_energy:
                self.energies = empty(plan.n_steps, batch, dtype=dtype)

        self.calls = [
            self._step_arguments(j, x, x_refs, xis, chain_offset) for j, x in enumerate(xs)
        ]
        self.noise_calls = [
            self._noise_arguments(j, x, xis, chain_offset) if plan.noise_first else []
            for j, x in enumerate(xs)
        ]

    def _noise_when(self, step: int) -> int:
        plan = self.plan
        if not plan.noise_first:
            return 0
        last = step + 1 == plan.n_steps
        return 2 if last or self.settled is not None or plan.records(step) else 1

    def _step_arguments(
        self,
        j: int,
        x: Tensor,
        x_refs: Tensors | None,
        xis: tuple[Tensors, ...] | None,
        chain_offset: int,
    ) -> list[dict[str, Any]]:
        """Keyword arguments of ``ops.langevin_step_`` for tensor j, one dict for each step."""
        plan = self.plan
        common: dict[str, Any] = {
            name: place(name, value, x) for name, value in plan.coefficients.items()
        }
        common.update(plan.clips, is_score=plan.gradient.is_score, chain_offset=chain_offset)
        if x_refs is not None:
            common["x_ref"] = x_refs[j]
        if self.active is not None:
            common.update(active=self.active, freeze_nonfinite=len(self.xs) == 1)
        rows = []
        for step in range(plan.n_steps):
            row = {**common, "step": step, "noise_when": self._noise_when(step)}
            row["clamp"] = plan.clamp_at(step)
            if xis is not None:
                row["xi"] = xis[j][min(step + (row["noise_when"] == 1), plan.n_steps - 1)]
            if plan.keep_stats:
                row["stats"] = self.sums[j][step]
            rows.append(row)
        return rows

    def _noise_arguments(
        self, j: int, x: Tensor, xis: tuple[Tensors, ...] | None, chain_offset: int
    ) -> list[dict[str, Any]]:
        noise = place("noise", self.plan.coefficients["noise"], x)
        common: dict[str, Any] = {"noise": noise, "chain_offset": chain_offset}
        if self.active is not None:
            common["active"] = self.active
        xi = None if xis is None else xis[j]
        return [
            {**common, "step": step, "xi": None if xi is None else xi[step]}
            for step in range(self.plan.n_steps)
        ]

    def run(self) -> None:
        """All steps of the chain, on ``xs`` in place."""
        plan = self.plan
        if plan.noise_first and plan.n_steps:
            self._add_noise(0)
        for step in range(plan.n_steps):
            grads, u = plan.gradient(self.leaves, self.leaf_state, self.model_kwargs, False)
            self._update(step, grads)
            if self.active is not None and self.steps_alive is not None:
                self.steps_alive += self.active
            if self.settled is not None:
                self._settle()
            if plan.keep_stats or plan.keep_trajectory:
                self._record(step, u)
            if plan.noise_first and step + 1 < plan.n_steps and self._noise_when(step) == 2:
                self._add_noise(step + 1)
        if self.settled is not None:
            for x, settled in zip(self.xs, self.settled, strict=True):
                x.copy_(settled)

    def _update(self, step: int, grads: Tensors) -> None:
        grads = tuple(self._laid_out(j, grad) for j, grad in enumerate(grads))
        if len(grads) == 1:
            ops.langevin_step_(self.xs[0], grads[0], self.rngs[0], **self.calls[0][step])
            return
        self._mask_jointly(grads)
        shrink = self._joint_norm_scale(grads)
        for x, grad, rng, calls in zip(self.xs, grads, self.rngs, self.calls, strict=True):
            call = calls[step]
            if shrink is not None:
                call = {**call, "drift": _row(call["drift"], step) * shrink, "grad_norm": None}
            ops.langevin_step_(x, grad, rng, **call)

    def _laid_out(self, j: int, grad: Tensor) -> Tensor:
        """The gradient in x's dtype and memory layout, which the op requires."""
        x = self.xs[j]
        if grad.dtype == x.dtype and grad.stride() == x.stride():
            return grad
        buffer = self.grad_buffers[j]
        if buffer is None:
            buffer = self.grad_buffers[j] = torch.empty_like(x)
        return buffer.copy_(grad)

    def _mask_jointly(self, grads: Tensors) -> None:
        """A chain of several tensors stops as a whole, before any of them moves."""
        if self.active is not None:
            for grad in grads:
                self.active &= grad.flatten(1).isfinite().all(1)

    def _joint_norm_scale(self, grads: Tensors) -> Tensor | None:
        """Factor (1, B) that brings the norm over all tensors to at most grad_norm."""
        limit, clip = self.plan.clips.get("grad_norm"), self.plan.clips.get("grad_clip")
        if limit is None:
            return None
        flat = [grad.flatten(1) for grad in grads]
        if clip is not None:
            flat = [grad.clamp(-clip, clip) for grad in flat]
        norm = torch.stack([g.square().sum(1) for g in flat]).sum(0).sqrt()
        return (limit / norm).clamp(max=1.0)[None]

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
        for x, rng, calls in zip(self.xs, self.rngs, self.noise_calls, strict=True):
            ops.langevin_noise_(x, rng, **calls[step])

    def statistics(self) -> ChainStatistics | None:
        """The recorded sums as norms and fractions over the whole state."""
        if not self.plan.keep_stats:
            return None
        total = torch.stack(self.sums).sum(0)
        n_elements = sum(x[0].numel() for x in self.xs) if total.shape[1] else 1
        return ChainStatistics(
            energy=self.energies,
            grad_norm=total[..., 0].sqrt(),
            displacement=total[..., 1].sqrt(),
            clip_fraction=total[..., 2] / n_elements,
            clamp_fraction=total[..., 3] / n_elements,
            nonfinite=total[..., 4].to(torch.int64),
        )


def _row(value: Coefficient, step: int) -> Coefficient:
    """The (1, B or 1) row of a coefficient at a step."""
    if not isinstance(value, Tensor):
        return value
    index = step if value.shape[0] > 1 else 0
    return value[index : index + 1]
