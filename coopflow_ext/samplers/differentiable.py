"""Chains through which gradients flow, with respect to the start, the energy's parameters and the
coefficients of the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from coopflow_ext import ops
from coopflow_ext._model_state import ModelState, random_state, set_random_state
from coopflow_ext._tensors import leaf_of, per_chain_view
from coopflow_ext.autocast import as_it_is
from coopflow_ext.samplers.chain import Chain, joint_norm_scale, laid_out
from coopflow_ext.samplers.gradient import check_energy, check_score, parameters_of
from coopflow_ext.samplers.nested import map_tensors
from coopflow_ext.samplers.output import Tensors, pack
from coopflow_ext.samplers.schedule import place

_Masks = tuple[Tensor, Tensor]  # not frozen yet, steps until then; both (B,)


class DifferentiableChain:
    """The steps of a chain from ``first_step`` on, as functions instead of updates in place.

    The in-place update runs beside each functional one, on the chain's own buffers: it keeps the
    mask of non-finite gradients and the statistics.

    Args:
        chain: gives the plan, the inputs and the arguments of each step.
        checkpoint_every: recompute instead of store, in segments of so many steps.
    """

    def __init__(self, chain: Chain, checkpoint_every: int | None) -> None:
        self.chain, self.plan = chain, chain.plan
        self.checkpoint_every = checkpoint_every
        self.recorded: list[Tensors] = []
        # The tables of coefficients that want gradients, and their rows, (1, B or 1).
        self.learned = {
            name: table
            for name, value in self.plan.coefficients.items()
            if isinstance(table := place(name, value, *chain.xs), Tensor) and table.requires_grad
        }
        # Steps that are run again start a graph of their own, which ends at copies.
        again = checkpoint_every is not None
        tables = [leaf_of(table) if again else table for table in self.learned.values()]
        self._rows = {
            name: table.split(1) for name, table in zip(self.learned, tables, strict=True)
        }
        self._wanted: Tensors = tuple(self.learned.values())
        self._leaves: Tensors = tuple(tables)
        if again:
            self._copy_arguments()

    def run(self, xs: Tensors, first_step: int) -> Tensors:
        """The last state. Records trajectory and statistics on the way."""
        chain, n_steps = self.chain, self.plan.n_steps
        masks = self._masks(first_step)
        stride = self.checkpoint_every or max(n_steps, 1)
        weights = self._weights(xs) if self.checkpoint_every and n_steps else ()
        wanted, leaves = (*weights, *self._wanted), (*weights, *self._leaves)
        if self.plan.keep_trajectory and self.plan.keep_start and not first_step:
            self.recorded.append(xs)
        for start in range(first_step, n_steps, stride):
            segment = partial(self._segment, start, min(start + stride, n_steps))
            if self.checkpoint_every is None:
                outputs = segment(masks, xs)
            else:
                outputs = _Checkpoint.apply(  # type: ignore[no-untyped-call]
                    segment, masks, leaves, *xs, *wanted
                )
            masks = (outputs[0], outputs[1])
            states = outputs[2:]
            rows = [states[i : i + len(xs)] for i in range(0, len(states), len(xs))]
            self.recorded += rows[:-1]
            xs = rows[-1]
        if chain.active is not None and chain.frozen_at is not None:
            chain.active.copy_(masks[0])
            chain.frozen_at.copy_(masks[1])
        return xs

    def trajectory(self) -> Tensors | None:
        """The recorded states: those of the chain's in-place steps, then those of :meth:`run`."""
        kept = self.chain.records.trajectory
        if kept is None or not self.recorded:
            return kept
        return tuple(
            torch.cat([fast[: len(fast) - len(self.recorded)], torch.stack(states)])
            for fast, states in zip(kept, zip(*self.recorded, strict=True), strict=True)
        )

    def _learned_at(self, step: int) -> dict[str, Tensor]:
        """The rows of coefficients that want gradients."""
        return {name: rows[step if len(rows) > 1 else 0] for name, rows in self._rows.items()}

    def _masks(self, first_step: int) -> _Masks:
        chain, x = self.chain, self.chain.xs[0]
        if first_step and chain.active is not None and chain.frozen_at is not None:
            return chain.active.clone(), chain.frozen_at.clone()
        ones = x.new_ones(x.shape[0], dtype=torch.bool)
        return ones, torch.full_like(ones, self.plan.n_steps, dtype=torch.int64)

    def _copy_arguments(self) -> None:
        """Gives the energy copies of its arguments that want gradients, which may be results of the
        caller's own graph."""
        copies: dict[Tensor, Tensor] = {}

        def copied(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            return copies.setdefault(tensor, leaf_of(tensor))

        inputs = self.chain.inputs
        self.chain.inputs = replace(
            inputs,
            model_kwargs=map_tensors(copied, inputs.model_kwargs),
            step_kwargs=map_tensors(copied, inputs.step_kwargs),
        )
        self._wanted += tuple(copies)
        self._leaves += tuple(copies.values())

    def _weights(self, xs: Tensors) -> Tensors:
        """The model's parameters that want gradients, and what else its output depends on at x0 in
        the first step."""
        module, device = self.plan.gradient.module, xs[0].device
        parameters = list(parameters_of(module))
        if not all(p.is_leaf for p in parameters):
            raise ValueError(
                "checkpoint_every needs an energy whose parameters are leaves: its steps are run "
                "again in the backward pass, when torch.func.functional_call is over"
            )
        points = tuple(map(leaf_of, xs))
        before = ModelState(module, device)
        with torch.enable_grad(), self.chain.autocast():
            output = self.plan.gradient.function(
                pack(points, self.chain.inputs.like), **self.chain.arguments(0)
            )
        before.restore(if_changed=True)
        if self.plan.gradient.has_energy:
            outputs: Tensors = (check_energy(output, xs[0].shape[0]),)
        else:
            outputs = check_score(output, xs)
        others = _leaves_under(outputs).difference(points, self._leaves)
        learning = [p for p in parameters if p.requires_grad]
        return tuple(dict.fromkeys([*learning, *others]))

    def _segment(
        self, start: int, stop: int, masks: _Masks, xs: Tensors, create_graph: bool = True
    ) -> Tensors:
        """The two masks, the recorded states and the last state."""
        kept: list[Tensor] = []
        for step in range(start, stop):
            xs, masks = self._step(step, xs, masks, create_graph)
            if self.plan.keeps_state(step):
                kept += xs
        return *masks, *kept, *xs

    def _step(
        self, step: int, xs: Tensors, masks: _Masks, create_graph: bool
    ) -> tuple[Tensors, _Masks]:
        chain, plan = self.chain, self.plan
        points = self._with_noise_before(step, xs)
        points = tuple(p if p.requires_grad else _leaf(p) for p in points)
        state = pack(points, chain.inputs.like)
        kwargs = chain.arguments(step)
        with chain.autocast():
            grads, u = plan.gradient(points, state, kwargs, create_graph=create_graph)
        if not create_graph:
            points = tuple(p.detach() for p in points)
        masks = self._beside(step, points, tuple(g.detach() for g in grads), u, masks)
        if plan.masked:  # or the clips of a stopped chain would have derivatives that are NaN
            grads = tuple(torch.where(per_chain_view(masks[0], g), g, 0) for g in grads)
        grads, applied = self._joint_clip(grads) if len(xs) > 1 else (grads, {})
        arguments = {**self._learned_at(step), **applied}
        moved = tuple(
            chain.functional_step(j, step, x, laid_out(grad, x), **arguments)
            for j, (x, grad) in enumerate(zip(points, grads, strict=True))
        )
        if plan.after_step is not None:
            moved = chain.followed(moved, step)
        if plan.masked:
            pairs = zip(moved, xs, strict=True)
            moved = tuple(torch.where(per_chain_view(masks[0], x), new, x) for new, x in pairs)
        return moved, masks

    def _with_noise_before(self, step: int, xs: Tensors) -> Tensors:
        if not self.plan.noise_first:
            return xs
        noisy = []
        for j, x in enumerate(xs):
            zeros = torch.zeros_like(x, requires_grad=False)
            arguments, rng = self.chain.noise_arguments(j, step), self.chain.rngs[j]
            learned = self._learned_at(step).get("noise")
            if learned is None:
                noise = ops.langevin_noise_(zeros, rng, **arguments)
            else:
                arguments.update(drift=0.0, noise=learned)
                noise = ops.langevin_step(zeros, zeros, rng, **arguments)
            x = x + noise
            noisy.append(x if self.plan.noise_clamp is None else x.clamp(*self.plan.noise_clamp))
        return tuple(noisy)

    @torch.no_grad()
    def _beside(
        self, step: int, xs: Tensors, grads: Tensors, u: Tensor | None, masks: _Masks
    ) -> _Masks:
        """The same step in place on the chain's buffers; returns the masks after it."""
        chain = self.chain
        if not (self.plan.masked or self.plan.keep_stats):
            return masks
        for buffer, x in zip(chain.xs, xs, strict=True):
            buffer.copy_(x)
        if chain.records.energies is not None and u is not None:
            chain.records.energies[step].copy_(u)
        if chain.active is not None and chain.frozen_at is not None:
            chain.active.copy_(masks[0])
            chain.frozen_at.copy_(masks[1])
        noise_when = chain.noise_when(step, pauses=True)
        chain.update(step, grads, noise_when=noise_when, ends=step + 1 == self.plan.n_steps)
        if chain.active is None or chain.frozen_at is None:
            return masks
        return chain.active.clone(), chain.frozen_at.clone()

    def _joint_clip(self, grads: Tensors) -> tuple[Tensors, dict[str, None]]:
        """Clips whose norm is over all tensors, and the options of the op that they stand for."""
        shrink = joint_norm_scale(self.plan.clips, grads)
        if shrink is None:
            return grads, {}
        clip = self.plan.clips.get("grad_clip")
        clipped = grads if clip is None else tuple(grad.clamp(-clip, clip) for grad in grads)
        scaled = tuple(grad * per_chain_view(shrink, grad) for grad in clipped)
        return scaled, {"grad_clip": None, "grad_norm": None}


def _leaf(x: Tensor) -> Tensor:
    """A leaf of x's values. torch.func's transforms forbid ``requires_grad_()``, but not this."""
    leaf = torch.empty_like(x, requires_grad=True)
    with torch.no_grad():
        leaf.copy_(x)
    return leaf


def _leaves_under(outputs: Tensors) -> set[Tensor]:
    """The tensors that want gradients and that these depend on."""
    seen: set[Any] = set()
    found = set()
    nodes = [o.grad_fn for o in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.add(leaf)
    return found


class _Checkpoint(torch.autograd.Function):
    """A segment of a chain that keeps its inputs and is run again for its gradient.

    torch.utils.checkpoint would recompute the segment already in the forward pass, once for the
    energy's gradient at each step.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        segment: Callable[..., Tensors],
        masks: _Masks,
        leaves: Tensors,
        *tensors: Tensor,
    ) -> Tensors:
        """``tensors``: the state's, and then those that want the gradients of ``leaves``."""
        xs = tensors[: len(tensors) - len(leaves)]
        ctx.segment, ctx.leaves = segment, leaves  # type: ignore[attr-defined]
        ctx.random = random_state(xs[0].device)  # type: ignore[attr-defined]
        ctx.autocast = as_it_is(xs[0].device.type)  # type: ignore[attr-defined]
        ctx.save_for_backward(*masks, *xs)
        with torch.enable_grad():
            outputs = segment(masks, tuple(x.detach() for x in xs), create_graph=False)
        outputs = tuple(o.detach() for o in outputs)
        ctx.mark_non_differentiable(*outputs[:2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        active, frozen_at, *saved = ctx.saved_tensors
        xs = tuple(map(leaf_of, saved))
        device = xs[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            set_random_state(ctx.random, device)
            with torch.enable_grad(), ctx.autocast():
                outputs = ctx.segment((active, frozen_at), xs)[2:]
        inputs = (*xs, *ctx.leaves)
        if forgotten := _leaves_under(outputs).difference(inputs):
            shapes = sorted(tuple(t.shape) for t in forgotten)
            raise RuntimeError(
                "checkpoint_every: the energy uses tensors that require grad, of shapes "
                f"{shapes}, that are no parameters of a module and that it did not use at x0 in "
                "the first step, and their gradients would be lost; give the energy as a module "
                "that has them as parameters, or give them as arguments"
            )
        return (None, None, None, *torch.autograd.grad(
            outputs, inputs, grads[2:], allow_unused=True
        ))  # fmt: skip
