"""The Langevin sampler: a drop-in for the loop x ← x − drift·∇U + noise·ξ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from coopflow_ext._checks import check_choice, check_count, check_flag, check_number
from coopflow_ext._tensors import Coefficient
from coopflow_ext.rng import Key
from coopflow_ext.samplers.chain import AfterStep, Chain, Inputs, Plan, clones, laid_out, ran
from coopflow_ext.samplers.checks import (
    check_can_read,
    check_chain_counts,
    check_constant,
    check_kwargs,
    check_like,
    check_state,
    check_steps,
)
from coopflow_ext.samplers.coefficients import Coefficients
from coopflow_ext.samplers.differentiable import DifferentiableChain
from coopflow_ext.samplers.gradient import Gradient, StateFunction, constant, parameters_of
from coopflow_ext.samplers.graph import Replayed, can_capture, graphs_for
from coopflow_ext.samplers.inputs import normals_like, rng_tensors, state_copy
from coopflow_ext.samplers.kernel import Kernel, KernelChain, kernel_for, no_kernel, refusal
from coopflow_ext.samplers.output import (
    ChainStatistics,
    SamplerOutput,
    State,
    Tensors,
    nonfinite_error,
    pack,
)
from coopflow_ext.samplers.precision import casts_for
from coopflow_ext.samplers.schedule import Schedule, per_chain
from coopflow_ext.samplers.step_kwargs import check_accepted, check_step_kwargs, rows_for_call
from coopflow_ext.samplers.step_rules import RuleOptions, check_preconditioner


class _Result(NamedTuple):
    xs: Tensors
    trajectory: Tensors | None
    stats: ChainStatistics | None
    frozen_at: Tensor | None


def _check_clamp(clamp: tuple[float, float] | None) -> tuple[float, float] | None:
    if clamp is None:
        return None
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        raise TypeError(f"clamp must be a pair (lo, hi), got {clamp!r}")
    if not all(isinstance(bound, (Real, Tensor)) for bound in clamp):
        raise TypeError(f"clamp must be a pair of numbers (lo, hi), got {clamp!r}")
    check_constant("clamp", *clamp)
    lo, hi = float(clamp[0]), float(clamp[1])
    if not lo <= hi:
        raise ValueError(f"clamp must be (lo, hi) with lo ≤ hi, got ({lo}, {hi})")
    return lo, hi


def _check_differentiable(
    differentiable: object, checkpoint_every: object, cuda_graph: object
) -> None:
    check_choice("differentiable", differentiable, (True, False, "last"))
    if checkpoint_every is not None:
        check_count("checkpoint_every", checkpoint_every, 1)
        if differentiable is not True:
            raise ValueError("checkpoint_every needs differentiable=True")
    if differentiable and cuda_graph is True:
        raise ValueError("cuda_graph=True cannot be used with differentiable")


def _rules(
    *,
    snr_over: Literal["chain", "batch"] | None,
    preconditioner: Tensor | Sequence[Tensor] | None,
    momentum: float | None,
    nesterov: bool,
) -> RuleOptions | None:
    """What steps make of ∇U and ξ; None where it is nothing. TypeError or ValueError."""
    if momentum is not None:
        momentum = check_number("momentum", momentum, minimum=0.0)
    if nesterov and momentum is None:
        raise ValueError("nesterov=True needs momentum")
    diagonal = None if preconditioner is None else check_preconditioner(preconditioner)
    rules = RuleOptions(snr_over, diagonal, momentum, nesterov)
    return None if rules == RuleOptions() else rules


def _check_beside(rules: RuleOptions, beside: Mapping[str, bool]) -> None:
    """ValueError where two rules, or a rule and another option, exclude each other."""
    on = {
        "snr": rules.snr_over is not None,
        "preconditioner": rules.preconditioner is not None,
        "momentum": rules.momentum is not None,
    }
    names = [name for name, is_on in on.items() if is_on]
    if on["snr"] and len(names) > 1:
        raise ValueError(f"snr cannot be used with {' or '.join(names[1:])}")
    for other, excluded in beside.items():
        if excluded:
            raise ValueError(f"{names[0]} cannot be used with {other}")


class LangevinSampler:
    """Langevin chains x ← x − drift·∇U(x) + noise·ξ, ξ ~ N(0, I), p ∝ exp(−U).

    Equivalent to, for each of n_steps steps (plain options)::

        grad, = torch.autograd.grad(energy(x).sum(), x)
        x = (x - drift * grad + noise * torch.randn_like(x)).clamp(lo, hi)

    but fused, with noise that depends only on the key, the chain's number and the step, not on the
    batch or the number of threads, nor, but for rounding, on the device.

    Args:
        energy: nn.Module or callable of the state; returns U as (B,), (B, 1) or (B, 1, 1, 1), and
            for one chain also as (). Its parameters get no gradients and are not touched, so that
            other threads may use it meanwhile, but must stay constant during the chain.
        score: instead of energy, a callable that gives ∇log p = −∇U, of x's shape.
        n_steps: number of steps T.
        step_size: δ: drift δ²/2, noise δ·√temperature.
        drift: instead of step_size; without ``noise``, the noise is √(2·drift·temperature).
        noise: standard deviation of the noise of a step; only with ``drift``. 0 turns it off.
        temperature: multiplies the noise by its square root, leaves the drift.
        snr: r, a schedule, instead of step_size and drift: each step has drift α = 2·(r·‖ξ‖/‖g‖)²
            and noise √(2α), g the gradient before clips, so that the norms of what noise and
            gradient move are as √(2α)‖ξ‖ : α‖g‖ = 1 : r. A chain whose gradient is 0 stays. Nothing
            is read by the host; costs two launches for the noise and a dozen small ones for the
            sizes. Not with reference_std, pull, denoise, noise_before_gradient, differentiable.
        snr_over: "chain": the norms of each chain; "batch": their means over the batch, as
            published, with which a chain depends on the others of its batch, and on how many.
        preconditioner: the diagonal P > 0, broadcastable to a chain's shape (for a state of several
            tensors a sequence of them): x⁺ = x − drift·P·∇U + noise·√P·ξ, of the same stationary
            law. Clips are of P·∇U, and so is ``grad_norm`` of ``stats``. Costs four launches for
            each tensor of the state. Not with reference_std, pull (add their terms to the energy),
            snr, differentiable.
        momentum: μ: v⁺ = μv + ∇U takes the place of ∇U (also in clips and ``stats``), v = 0 before
            each chain; for descent (noise=0): with noise it no longer samples exp(−U). Not with
            snr, differentiable.
        nesterov: with momentum, x⁺ = x − drift·m⁺, m⁺ = ∇U(x − drift·μ·m): taken ahead by the
            gradient of the step before alone, as equilibrium matching does; m is not accumulated.
        negative_energy: ``energy`` returns f = −U.
        grad_clip: clip each element of the gradient to ±grad_clip.
        grad_norm: then scale each chain's gradient to L2 norm ≤ grad_norm.
        step_clip: clip each element of the scaled step (drift, without noise) to ±step_clip.
        clamp: (lo, hi), bounds of the state.
        clamp_when: clamp after every "step" or only at the "end"; with noise_before_gradient also
            only after the "noise", before the gradient is taken, or at "both".
        noise_before_gradient: x′ = x + noise·ξ, and the gradient is taken at x′.
        reference_std: σ of a Gaussian reference; adds ‖x‖²/(2σ²) to U, here and in pull behind
            grad_clip and grad_norm, which are of the energy's own gradient, as the statistics are.
        pull: (x_ref, strength), adds ½·strength·‖x − x_ref‖² to U; strength a float or (B,).
            x_ref None means that it is given at the call.
        step_kwargs: further keyword arguments of the energy or score that differ from step to step,
            tensors with a row for each: (T,) gives it a 0-d tensor at each step, (T, B or 1, …)
            gives (B, …); float64 beside a float64 state, else floating-point numbers come as
            float32. A noise level, a time, a label::

                sampler = cf.LangevinSampler(score=net, n_steps=T, drift=eps * sigma**2,
                                             step_kwargs={"sigma": sigma})  # sigma: (T,)

            In a captured chain, one copy for each name and piece of up to 16 steps.
        after_step: a callable of (x, step), called after every step: a projection, a mask of
            inpainting. x is a state that it may change in place (returning None), or it returns
            the new one; step is a 0-d int64 tensor on x's device, counted from 0 in each call.
            Chains that have stopped keep theirs. It is captured with the chain (then what it
            changes beside x is brought back after the capture only where that is a buffer of the
            energy's module), and what it does is not counted in ``stats``. With checkpoint_every no
            gradient reaches what it alone reads.
        denoise: c ≥ 0, a float or (B,): one more step x ← x − c·∇U(x), which is counted like the
            others but has no noise (Tweedie's formula where c is the variance of the noise that
            the score is of). It has the last row of step_kwargs again; clips and clamp are as in
            every step, ``xi`` has no row for it.
        return_trajectory: keep the states after steps thin, 2·thin, …
        thin: see return_trajectory.
        include_start: x0 is the first state of the trajectory.
        stats: record :class:`ChainStatistics`.
        on_nonfinite: a chain is masked from its first non-finite gradient on, so that it keeps the
            state that it had then; then "raise" :class:`NonFiniteError` after the chain, or
            "freeze" silently. "ignore": no mask, no check. With ``differentiable`` derivatives by
            what all chains share (parameters, learned coefficients) are NaN where a stopped
            chain's second derivatives are.
        autocast: torch.bfloat16 or float16: the model computes in it, on copies of its weights
            made once per chain; the state keeps its dtype. Weights can be copied where the energy
            or score is an nn.Module or a method of one; the caller's module is left as it is.
            Where one kernel makes all the steps (``kernel``), bfloat16 is what tensor cores take
            of its products between hidden layers, and a CPU computes in the dtype of x0.
        channels_last: the state and 4-D weights (of such a module) are laid out as channels_last.
        compile: compile the gradient with torch.compile at the first call; where that fails, one
            warning says why and the chain runs without.
        kernel: "auto": where a kernel knows the energy, one launch makes all the steps. It knows
            DoubleWellEnergy, FunnelEnergy, GaussianEnergy, GaussianMixtureEnergy, RastriginEnergy
            and RosenbrockEnergy, also by their method ``score``, for x0 (B, D) in float32 or
            float64 (on CUDA D ≤ 64); MLPEnergy, and nn.Sequential of Linear and SiLU, ReLU,
            LeakyReLU, ELU, Tanh, Softplus or GELU in turn, all activations alike, with 1 to 4
            hidden layers, D and widths ≤ 128 (on CUDA in float32, where the weights fit in a
            multiprocessor's memory); all in x0's dtype on its device. Not subclasses, nor with
            hooks, compile, differentiable, noise_before_gradient, channels_last, model_kwargs,
            step_kwargs, snr, preconditioner, momentum or after_step, in the caller's autocast, nor
            with the option autocast but for a network's to bfloat16 (:func:`ops.mlp_langevin_chain`
            tells its error). The noise is the same, the gradient differs by rounding. True: a
            ValueError says why it cannot. False: step by step.
        cuda_graph: "auto": on CUDA up to 16 steps are captured once for each shape and replayed for
            any number of steps and any coefficients; where that is impossible, one warning says
            why. True: raise instead. False: never. In a stream that is being captured already
            (a whole iteration as one graph) the steps become part of that capture. Under a dispatch
            mode, such as a counter of operations, which would see nothing of a graph, none is used.
            A capture leaves the energy's buffers and torch's generators as they were, so that T
            steps count as T (for a plain callable the generators only: buffers that it reaches
            through a closure have seen a few steps more). A replay does again what the device did
            in the capture, and Python sees nothing of it: an energy that draws its next minibatch
            in Python, reads a schedule from an attribute or counts its calls needs False.
        differentiable: gradients flow through the chain to x0, to the energy's parameters and to
            coefficients that require them; ``torch.func.grad`` goes through it too. "last": only
            through the last step.
        checkpoint_every: with differentiable, keep only every so many states and recompute the
            steps between them in the backward pass. The energy's parameters must be leaves; what
            it uses beside them and its arguments must be used at x0 in the first step already, else
            the backward pass raises. Not inside a transform of torch.func.

    step_size, drift, noise and temperature are a float, a callable of the step, (T,) values, or a
    tensor (T or 1, B or 1). With ``differentiable`` gradients flow to those that require it, and
    each call takes the values that they have by then; without, they may not require it. With
    ``channels_last`` states, elements of a chain take their noise in storage order.

    Relative error of the gradient of ``ResEnergy`` (width 16) at 32×32 against float64, measured on
    a CPU: 6e-7 in float32, 1e-6 with ``channels_last`` or ``compile``, 8e-3 with autocast to
    bfloat16 (that of torch.autocast itself).

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
        snr: Schedule | None = None,
        snr_over: Literal["chain", "batch"] = "chain",
        preconditioner: Tensor | Sequence[Tensor] | None = None,
        momentum: float | None = None,
        nesterov: bool = False,
        negative_energy: bool = False,
        grad_clip: float | None = None,
        grad_norm: float | None = None,
        step_clip: float | None = None,
        clamp: tuple[float, float] | None = None,
        clamp_when: Literal["step", "end", "noise", "both"] = "step",
        noise_before_gradient: bool = False,
        reference_std: float | None = None,
        pull: tuple[State | None, float | Tensor | Sequence[float]] | None = None,
        step_kwargs: Mapping[str, Tensor] | None = None,
        after_step: AfterStep | None = None,
        denoise: float | Tensor | Sequence[float] | None = None,
        return_trajectory: bool = False,
        thin: int = 1,
        include_start: bool = False,
        stats: bool = False,
        on_nonfinite: Literal["raise", "freeze", "ignore"] = "raise",
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        compile: bool = False,
        kernel: bool | Literal["auto"] = "auto",
        cuda_graph: bool | Literal["auto"] = "auto",
        differentiable: bool | Literal["last"] = False,
        checkpoint_every: int | None = None,
    ) -> None:
        n_steps = check_steps(n_steps)
        flags = {
            "negative_energy": negative_energy,
            "nesterov": nesterov,
            "noise_before_gradient": noise_before_gradient,
            "return_trajectory": return_trajectory,
            "include_start": include_start,
            "stats": stats,
            "channels_last": channels_last,
            "compile": compile,
        }
        for name, flag in flags.items():
            check_flag(name, flag)
        check_choice("clamp_when", clamp_when, ("step", "end", "noise", "both"))
        if clamp_when in ("noise", "both") and not noise_before_gradient:
            raise ValueError(f"clamp_when={clamp_when!r} needs noise_before_gradient=True")
        bounds = _check_clamp(clamp)
        check_choice("on_nonfinite", on_nonfinite, ("raise", "freeze", "ignore"))
        self.x_ref: State | None = None
        self.needs_x_ref, strength = pull is not None, None
        if pull is not None:
            self.x_ref, strength = _check_pull(pull)
        if reference_std is not None:
            reference_std = check_number(
                "reference_std", reference_std, minimum=0.0, exclusive=True
            )
            if not 1e-150 <= reference_std <= 1e150:
                raise ValueError(
                    f"reference_std must have a square in float64, got {reference_std:g}"
                )
        given = _given(
            step_size=step_size, drift=drift, noise=noise, temperature=temperature, snr=snr
        )
        check_choice("snr_over", snr_over, ("chain", "batch"))
        rules = _rules(
            snr_over=None if snr is None else snr_over,
            preconditioner=preconditioner,
            momentum=momentum,
            nesterov=nesterov,
        )
        if rules is not None:
            beside = {
                "differentiable": differentiable is not False,
                "noise_before_gradient": rules.snr_over is not None and noise_before_gradient,
                "reference_std": rules.preconditioner is not None and reference_std is not None,
                "pull": rules.preconditioner is not None and pull is not None,
            }
            _check_beside(rules, beside)
        self._coefficients = Coefficients(
            n_steps,
            given,
            reference_std=reference_std,
            pull=strength,
            denoise=None if denoise is None else per_chain("denoise", denoise),
            learnable=bool(differentiable),
        )
        self._n_steps, self._extra_steps = n_steps, int(denoise is not None)
        if include_start and not return_trajectory:
            raise ValueError("include_start=True needs return_trajectory=True")
        if after_step is not None and not callable(after_step):
            raise TypeError(f"after_step must be callable, got {type(after_step).__name__}")
        limits = {"grad_clip": grad_clip, "grad_norm": grad_norm, "step_clip": step_clip}
        self.on_nonfinite = on_nonfinite
        _check_differentiable(differentiable, checkpoint_every, cuda_graph)
        check_choice("cuda_graph", cuda_graph, (True, False, "auto"))
        check_choice("kernel", kernel, (True, False, "auto"))
        self.checkpoint_every = checkpoint_every
        self.cuda_graph = cuda_graph
        if compile and differentiable:
            warnings.warn(
                "compile=True: torch.compile cannot differentiate twice; differentiable steps run "
                "without",
                stacklevel=2,
            )
        self._graphs = None if differentiable else graphs_for(cuda_graph)
        if autocast is not None:
            check_choice("autocast", autocast, (torch.bfloat16, torch.float16))
        gradient = Gradient(energy, score, negative_energy=negative_energy, compile=compile)
        self.plan = Plan(
            gradient=gradient,
            n_steps=n_steps + self._extra_steps,
            differentiable=differentiable,
            coefficients=self._coefficients.combined.values,
            clips={
                name: check_number(name, limit, minimum=0.0, exclusive=True)
                for name, limit in limits.items()
                if limit is not None
            },
            step_clamp=bounds if clamp_when in ("step", "both") else None,
            end_clamp=bounds if clamp_when == "end" else None,
            noise_clamp=bounds if clamp_when in ("noise", "both") else None,
            noise_first=noise_before_gradient,
            thin=check_count("thin", thin, 1),
            keep_trajectory=return_trajectory,
            keep_stats=stats,
            masked=on_nonfinite != "ignore",
            autocast=autocast,
            channels_last=channels_last,
            casts=casts_for(gradient, autocast, channels_last=channels_last),
            keep_start=include_start,
            after_step=after_step,
            rules=rules,
        )
        self._step_kwargs = check_step_kwargs(step_kwargs)
        check_accepted(gradient, self._step_kwargs, ())
        self.kernel = kernel
        self._refusal = refusal(self.plan, compile=compile, differentiable=differentiable)
        if kernel is True and self._refusal:
            raise no_kernel(self._refusal)

    def __call__(
        self,
        x0: State,
        *,
        key: Key | None = None,
        xi: State | None = None,
        x_ref: State | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        step_kwargs: Mapping[str, Tensor] | None = None,
        n_steps: int | None = None,
        step_size: Schedule | None = None,
        drift: Schedule | None = None,
        noise: Schedule | None = None,
        temperature: Schedule | None = None,
    ) -> SamplerOutput:
        """Run the chains from x0, which is not modified.

        Args:
            x0: (B, …), floating point, or a list or tuple of such tensors; detached.
            key: where the noise comes from; None draws a seed from torch's default generator. Row i
                of x0 is chain ``key.chain + i``: shards of one batch pass
                ``key.at_chain(key.chain + first row)``.
            xi: the standard normals to use instead, (T, *x0.shape).
            x_ref: centre of the pull, shape of x0; replaces the one in ``pull=``.
            model_kwargs: further keyword arguments of the energy or score; tensors may be nested
                in dicts, lists and tuples.
            step_kwargs: as the sampler's, each in place of the sampler's of the same name, of which
                a call of fewer steps uses the first rows.
            n_steps, step_size, drift, noise, temperature: for this call, instead of the sampler's:
                step_size replaces its step_size, drift and noise; drift its step_size and drift;
                noise its noise and temperature. A captured chain serves every number of steps and
                every value; values per chain beside one for all need another capture, and so does
                a noise that is 0 beside one that is not. Of a table of the sampler the first
                n_steps rows are used; a callable is called again.

        Raises:
            NonFiniteError: with on_nonfinite="raise", when a gradient is not finite.
            OverflowError: when the key's time would reach 2³².
            ValueError: also where on_nonfinite="raise" would have to read from a stream that is
                being captured, and where a table of the sampler is shorter than n_steps.
        """
        given = _given(step_size=step_size, drift=drift, noise=noise, temperature=temperature)
        plan, chain_counts = self._plan_for(n_steps, given)
        xs = check_state(x0)
        check_chain_counts(chain_counts, len(xs[0]))
        if plan.rules is not None:
            plan.rules.check_fits(xs)
        if self.on_nonfinite == "raise":
            check_can_read(xs[0], "on_nonfinite='raise'", "; use 'freeze' or 'ignore'")
        key = Key.or_default(key)
        key.check_batch(len(xs[0]))
        after = key.advance(plan.n_steps)
        kwargs, rows = check_kwargs(model_kwargs), self._rows(step_kwargs, plan, xs, model_kwargs)
        kernel = kernel_for(
            self.kernel,
            plan.gradient,
            x0,
            {**kwargs, **rows},
            refused=self._refusal,
            autocast=plan.autocast,
        )
        # An energy needs autograd; a score runs as it would in the caller's own loop.
        needs_grad = kernel is None and (plan.gradient.has_energy or bool(plan.differentiable))
        grad_mode = needs_grad or torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad_mode):
            starts = self._starts(xs) if kernel is None else (xs[0].detach().contiguous(),)
            inputs = Inputs(
                like=x0,
                xs=starts,
                rngs=rng_tensors(key, xs),
                x_refs=self._x_refs(x_ref, starts),
                xis=normals_like(
                    xi,
                    starts,
                    plan.n_steps - self._extra_steps,
                    self._extra_steps,
                    keeps_graph=bool(plan.differentiable),
                ),
                model_kwargs=kwargs,
                step_kwargs=rows,
                step_numbers=torch.arange(plan.n_steps, device=starts[0].device)
                if plan.after_step is not None
                else None,
            )
            if kernel is not None:
                result = self._run_kernel(plan, inputs, kernel)
            elif plan.differentiable:
                result = self._run_differentiable(plan, inputs, xs)
            else:
                result = self._run_captured(plan, inputs) or self._run(plan, inputs)
        trajectory = None if result.trajectory is None else pack(result.trajectory, x0)
        out = SamplerOutput(pack(result.xs, x0), after, trajectory, result.stats)
        out.frozen_at = result.frozen_at
        return out

    def _plan_for(
        self, n_steps: int | None, given: Mapping[str, Schedule]
    ) -> tuple[Plan, Mapping[str, int]]:
        """The plan of a call, and for how many chains its options have values."""
        if n_steps is None and not given and not self._coefficients.learned:
            return self.plan, self._coefficients.combined.chain_counts
        steps = self._n_steps if n_steps is None else check_steps(n_steps)
        combined = self._coefficients.changed(steps, given)
        plan = replace(self.plan, n_steps=steps + self._extra_steps, coefficients=combined.values)
        return plan, combined.chain_counts

    def _rows(
        self,
        step_kwargs: Mapping[str, Tensor] | None,
        plan: Plan,
        xs: Tensors,
        model_kwargs: Mapping[str, Any] | None,
    ) -> dict[str, Tensor]:
        """The arguments of the energy that have a row for each step of a call."""
        if step_kwargs is None and not self._step_kwargs:
            return {}
        given = check_step_kwargs(step_kwargs)
        check_accepted(plan.gradient, {**self._step_kwargs, **given}, model_kwargs or ())
        with torch.inference_mode(False):
            return rows_for_call(
                self._step_kwargs,
                given,
                plan.n_steps - self._extra_steps,
                xs[0],
                repeat_last=bool(self._extra_steps),
            )

    def _starts(self, xs: Tensors) -> Tensors:
        """Copies for a chain to overwrite."""
        return tuple(state_copy(x, channels_last=self.plan.channels_last) for x in xs)

    def _run_kernel(self, plan: Plan, inputs: Inputs, kernel: Kernel) -> _Result:
        if self.cuda_graph is True:
            self._can_capture(inputs.xs[0])  # the same promise, kept without a graph
        chain = KernelChain(plan, inputs, kernel)
        stops = self._check_finite(chain, chain.last)
        return _Result(chain.last, chain.trajectory, chain.statistics(), stops)

    def _run(self, plan: Plan, inputs: Inputs) -> _Result:
        chain = ran(plan, inputs)
        stops = self._check_finite(chain, chain.last)
        return _Result(chain.last, chain.records.trajectory, chain.statistics(), stops)

    def _run_captured(self, plan: Plan, inputs: Inputs) -> _Result | None:
        """The same as CUDA graphs; None where there are none to be had."""
        if self._graphs is None or not plan.n_steps or not self._can_capture(inputs.xs[0]):
            return None
        with self._graphs.replayed(plan, inputs) as chain:
            if chain is None:
                return None
            stops = self._check_finite(chain, chain.last)
            records = chain.records
            return _Result(clones(chain.last), records.trajectory, chain.statistics(), stops)

    def _can_capture(self, x: Tensor) -> bool:
        return can_capture(x, required=self.cuda_graph is True)

    def _run_differentiable(self, plan: Plan, inputs: Inputs, xs: Tensors) -> _Result:
        """``xs``: the caller's tensors, to which gradients flow unless only through the end."""
        chain = ran(plan, inputs)
        whole = plan.differentiable is True
        starts = tuple(laid_out(x, buffer) for x, buffer in zip(xs, chain.xs, strict=True))
        starts = starts if whole else clones(chain.last)
        steps = DifferentiableChain(chain, self.checkpoint_every)
        with constant(parameters_of(plan.gradient.module)):
            ends = steps.run(starts, plan.fast_steps)
        stops = self._check_finite(chain, ends)
        if stops is not None:
            stops = stops.clone()  # a backward pass may make the steps again in the chain's memory
        return _Result(ends, steps.trajectory(), chain.statistics(), stops)

    def _check_finite(self, chain: Chain | Replayed | KernelChain, xs: Tensors) -> Tensor | None:
        """The steps at which chains stopped, if these are to be handed on; else the one read of
        the mask, after the chain that ended in ``xs``."""
        if self.on_nonfinite == "freeze":
            return chain.frozen_at
        if self.on_nonfinite == "ignore" or not chain.stopped():
            return None
        active, frozen_at = chain.active, chain.frozen_at
        assert active is not None
        assert frozen_at is not None
        advice = "use a smaller step, clips, or on_nonfinite='freeze'"
        raise nonfinite_error(active, frozen_at, xs, advice=advice)

    def _x_refs(self, x_ref: State | None, xs: Tensors) -> Tensors | None:
        if x_ref is not None and not self.needs_x_ref:
            raise ValueError("x_ref needs the option pull=(None, strength)")
        centre = self.x_ref if x_ref is None else x_ref
        if not self.needs_x_ref:
            return None
        if centre is None:
            raise ValueError("pull=(None, strength) needs x_ref= at the call")
        values = check_like("x_ref", centre, xs)
        if not self.plan.differentiable:
            values = tuple(v.detach() for v in values)
        return tuple(laid_out(v, x) for v, x in zip(values, xs, strict=True))


def _given(**schedules: Schedule | None) -> dict[str, Schedule]:
    """The options that are given."""
    return {name: schedule for name, schedule in schedules.items() if schedule is not None}


def _check_pull(
    pull: tuple[State | None, float | Tensor | Sequence[float]],
) -> tuple[State | None, Coefficient]:
    if not isinstance(pull, (tuple, list)) or len(pull) != 2:
        raise TypeError("pull must be a pair (x_ref, strength)")
    x_ref, strength = pull
    if x_ref is not None and not isinstance(x_ref, (Tensor, list, tuple)):
        raise TypeError(f"pull's x_ref must be a tensor or None, got {type(x_ref).__name__}")
    return x_ref, per_chain("pull's strength", strength)
