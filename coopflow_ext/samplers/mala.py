"""The Metropolis-adjusted Langevin algorithm: Langevin proposals with exact acceptance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext._checks import check_choice, check_count, check_flag, check_number
from coopflow_ext._tensors import Coefficient, flat, per_chain_view, table_row, widest
from coopflow_ext.rng import USE_ACCEPT, Key, stream
from coopflow_ext.samplers.chain import Chain, Inputs, Plan, clones, ran
from coopflow_ext.samplers.checks import (
    check_can_read,
    check_chain_counts,
    check_kwargs,
    check_state,
    check_steps,
)
from coopflow_ext.samplers.gradient import Gradient, StateFunction, constant, parameters_of
from coopflow_ext.samplers.graph import can_capture, graphs_for
from coopflow_ext.samplers.inputs import normals_like, rng_tensors, state_copy
from coopflow_ext.samplers.kernel import Kernel, kernel_for, no_kernel, refusal
from coopflow_ext.samplers.output import State, Tensors, nonfinite_error, pack
from coopflow_ext.samplers.precision import casts_for
from coopflow_ext.samplers.records import Records
from coopflow_ext.samplers.schedule import Schedule, chain_counts, coefficient, place


@dataclass(frozen=True)
class MALAStatistics:
    """Per step and per chain, each (T, B).

    Attributes:
        energy: U after the step.
        grad_norm: L2 norm of ∇U after the step.
        acceptance: probability with which the proposal was accepted.
        accepted: whether it was.
        step_size: δ of the proposal.
    """

    energy: Tensor
    grad_norm: Tensor
    acceptance: Tensor
    accepted: Tensor
    step_size: Tensor


class MALAOutput(NamedTuple):
    """See :class:`SamplerOutput`; ``step_size`` is (B,), δ after the adaptation."""

    x: Any  # a State, as is the next but one
    key: Key
    trajectory: Any
    stats: MALAStatistics | None
    step_size: Tensor


class MALASampler:
    """Chains whose stationary distribution is p ∝ exp(−U/temperature) exactly.

    One step proposes y = x − (δ²/2)·∇U(x) + δ·√temperature·ξ and accepts it with probability
    min(1, p(y) q(x|y) / (p(x) q(y|x))); a proposal whose energy or gradient is not finite is
    rejected. Roberts and Tweedie, Bernoulli 2 (1996).

    Args:
        energy: as in :class:`LangevinSampler`, also of several tensors, which are accepted as one;
            the acceptance needs U, so there is no ``score=``.
        n_steps: number of steps T, adaptation included.
        step_size: δ, the first one when it is adapted; a float, a callable of the step, (T,) or
            (T or 1, B or 1).
        temperature: a number > 0.
        negative_energy: ``energy`` returns −U.
        adapt_steps: in the first so many steps, move each chain's own δ toward the target
            acceptance (stochastic approximation; then the mean of log δ over the second half of
            them). Their samples are not from the stationary distribution.
        target_accept: acceptance to adapt to; 0.574 is optimal in high dimension.
        return_trajectory, thin, stats: as in :class:`LangevinSampler`; ``stats`` are
            :class:`MALAStatistics`.
        autocast, compile: as in :class:`LangevinSampler`. Chains are then exact for the energy as
            it is in that precision: with bfloat16 U itself is rounded to 8 bits, unless the energy
            makes its last sum in float32.
        kernel: "auto": where a kernel knows the energy, as in :class:`LangevinSampler`, one launch
            makes all the steps, but not with autocast. The random numbers are the same; the energy
            and its gradient differ by rounding. True: a ValueError says why it cannot. False: step
            by step.
        cuda_graph: as in :class:`LangevinSampler`; the acceptance is decided on the device.

    Raises:
        ValueError, TypeError: for an option out of range, by name.
    """

    def __init__(
        self,
        energy: StateFunction,
        *,
        n_steps: int,
        step_size: Schedule,
        temperature: float = 1.0,
        negative_energy: bool = False,
        adapt_steps: int = 0,
        target_accept: float = 0.574,
        return_trajectory: bool = False,
        thin: int = 1,
        stats: bool = False,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        kernel: bool | Literal["auto"] = "auto",
        cuda_graph: bool | Literal["auto"] = "auto",
    ) -> None:
        check_flag("negative_energy", negative_energy)
        n_steps = check_steps(n_steps)
        self.delta = coefficient("step_size", step_size, n_steps)
        self.chain_counts = chain_counts({"step_size": self.delta})
        if not bool((torch.as_tensor(self.delta, device="cpu") > 0).all()):
            raise ValueError("step_size must be > 0")
        self.temperature = check_number("temperature", temperature, minimum=0.0, exclusive=True)
        self.adapt_steps = check_count("adapt_steps", adapt_steps, 0)
        if self.adapt_steps and isinstance(self.delta, Tensor) and self.delta.shape[0] > 1:
            raise ValueError("adapt_steps needs a step_size that is the same at every step")
        if self.adapt_steps > n_steps:
            raise ValueError(f"adapt_steps must be ≤ n_steps = {n_steps}, got {adapt_steps}")
        self.target_accept = check_number("target_accept", target_accept)
        if not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept must be between 0 and 1, got {target_accept}")
        for name, flag in {
            "return_trajectory": return_trajectory, "stats": stats, "compile": compile
        }.items():  # fmt: skip
            check_flag(name, flag)
        if autocast is not None:
            check_choice("autocast", autocast, (torch.bfloat16, torch.float16))
        check_choice("kernel", kernel, (True, False, "auto"))
        check_choice("cuda_graph", cuda_graph, (True, False, "auto"))
        gradient = Gradient(energy, None, negative_energy=negative_energy, compile=compile)
        self.plan = MALAPlan(
            gradient=gradient,
            n_steps=n_steps,
            coefficients={
                "step_size": self.delta,
                **_adaptation(n_steps, self.adapt_steps),
            },
            thin=check_count("thin", thin, 1),
            keep_trajectory=return_trajectory,
            keep_stats=stats,
            masked=False,
            autocast=autocast,
            casts=casts_for(gradient, autocast),
            temperature=self.temperature,
            adapt_steps=self.adapt_steps,
            target_accept=self.target_accept,
        )
        self.kernel, self.cuda_graph = kernel, cuda_graph
        self._graphs = graphs_for(cuda_graph)
        self._refusal = refusal(self.plan, compile=compile, differentiable=False)
        if autocast is not None:
            self._refusal = "autocast is for steps one by one"
        if kernel is True and self._refusal:
            raise no_kernel(self._refusal)

    def __call__(
        self,
        x0: State,
        *,
        key: Key | None = None,
        xi: State | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> MALAOutput:
        """Run the chains from x0 (B, …), which is not modified; arguments as LangevinSampler's.

        Raises:
            NonFiniteError: the energy or its gradient is not finite at x0; found after the chain,
                with the one read that it takes.
            ValueError: also where that read is impossible, since the stream is being captured.
        """
        xs = check_state(x0)
        check_chain_counts(self.chain_counts, len(xs[0]))
        check_can_read(xs[0], "MALASampler")
        key = Key.or_default(key)
        key.check_batch(len(xs[0]))
        after = key.advance(self.plan.n_steps)
        kwargs = check_kwargs(model_kwargs)
        kernel = kernel_for(self.kernel, self.plan.gradient, x0, kwargs, refused=self._refusal)
        if kernel is not None:
            assert isinstance(x0, Tensor)
            return self._run_kernel(kernel, x0, key, xi)
        with torch.inference_mode(False), torch.enable_grad():
            starts = tuple(state_copy(x) for x in xs)
            accept_rng = stream(key, USE_ACCEPT, device=xs[0].device)
            inputs = Inputs(
                like=x0,
                xs=starts,
                rngs=(*rng_tensors(key, xs), accept_rng),
                x_refs=None,
                xis=normals_like(xi, starts, self.plan.n_steps),
                model_kwargs=kwargs,
            )
            result = self._run_captured(inputs)
            if result is None:
                chain = ran(self.plan, inputs)
                assert isinstance(chain, MALAChain)
                result = _Result(chain.last, chain.records, chain.delta, chain.finite_start)
        _check_start(xs, result.finite_start)
        trajectory, sums = result.records.trajectory, result.records.sums
        return MALAOutput(
            pack(result.xs, x0),
            after,
            None if trajectory is None else pack(trajectory, x0),
            _statistics(sums[0]) if sums else None,
            result.delta,
        )

    def _can_capture(self, x: Tensor) -> bool:
        return can_capture(x, required=self.cuda_graph is True)

    def _run_captured(self, inputs: Inputs) -> _Result | None:
        """As CUDA graphs; None where there are none to be had."""
        if self._graphs is None or not self.plan.n_steps or not self._can_capture(inputs.xs[0]):
            return None
        with self._graphs.replayed(self.plan, inputs) as replayed:
            if replayed is None:
                return None
            chain = replayed.chain
            assert isinstance(chain, MALAChain)
            return _Result(
                clones(replayed.last),
                replayed.records,
                chain.delta.clone(),
                chain.finite_start.clone(),
            )

    def _run_kernel(self, kernel: Kernel, x0: Tensor, key: Key, xi: State | None) -> MALAOutput:
        """All the steps in one call."""
        after = key.advance(self.plan.n_steps)
        if self.cuda_graph is True:
            self._can_capture(x0)  # the same promise, kept without a graph
        with torch.inference_mode(False), torch.no_grad():
            x0 = x0.detach().contiguous()
            xis = normals_like(xi, (x0,), self.plan.n_steps)
            result = kernel.mala(
                x0,
                rng=key.tensor(x0.device),
                accept_rng=stream(key, USE_ACCEPT, device=x0.device),
                **kernel.energy,
                n_steps=self.plan.n_steps,
                step_size=place("step_size", self.delta, x0),
                temperature=self.temperature,
                adapt_steps=self.adapt_steps,
                target_accept=self.target_accept,
                negative_energy=self.plan.gradient.sign < 0,
                xi=None if xis is None else xis[0],
                thin=self.plan.thin if self.plan.keep_trajectory else None,
                stats=self.plan.keep_stats,
            )
            _check_start((x0,), result.finite)
            stats = None if result.stats is None else _statistics(result.stats)
        return MALAOutput(result.x, after, result.trajectory, stats, result.step_size)


class _Result(NamedTuple):
    xs: Tensors
    records: Records
    delta: Tensor
    finite_start: Tensor


@dataclass(frozen=True, kw_only=True)
class MALAPlan(Plan):
    """Its ``coefficients`` are the step size and, for each step, what the adaptation does there."""

    temperature: float
    adapt_steps: int
    target_accept: float

    def chain(self, inputs: Inputs) -> MALAChain:
        return MALAChain(self, inputs)

    def records(self, xs: Tensors) -> Records:
        return self._records(xs, energy=False, columns=5)


class MALAChain(Chain):
    """T steps on fixed buffers, as :class:`Chain`; its ``xs`` are the proposals, where the gradient
    is taken. Whether they are accepted is decided on the device.

    Attributes:
        delta: (B,), δ of the next step.
        finite_start: (B,), whether the energy and its gradient were finite at the start.
    """

    plan: MALAPlan

    def __init__(self, plan: MALAPlan, inputs: Inputs) -> None:
        first, batch = inputs.xs[0], len(inputs.xs[0])
        work = widest(inputs.xs)
        self.delta = first.new_empty(batch, dtype=work)
        self.drift, self.noise = (first.new_empty(1, batch, dtype=work) for _ in range(2))
        super().__init__(plan, inputs)
        self.bound_gradient = partial(self.bound_gradient, wants_energy=True)
        self.propose = [
            step.in_place(x, rng)
            for step, x, rng in zip(self.steps, self.xs, self.rngs, strict=False)
        ]
        # Where the chains are, and the energy and its gradient there.
        self.current, self.grads = clones(self.xs), clones(self.xs)
        self.u = torch.zeros_like(self.delta)
        self.finite_start = first.new_ones(batch, dtype=torch.bool)
        self.log_delta, self.log_sum = torch.zeros_like(self.u), torch.zeros_like(self.u)

    def _bound_step(self, j: int) -> ops.BoundStep:
        return ops.BoundStep(
            drift=self.drift,
            noise=self.noise,
            xi=None if self.inputs.xis is None else self.inputs.xis[j],
            x_low=self.lows[j] if self.lows else None,
        )

    @property
    def last(self) -> Tensors:
        return self.current

    def begin(self) -> None:
        super().begin()
        for current, x in zip(self.current, self.xs, strict=True):
            current.copy_(x)
        self._set_delta(0)
        if not self.plan.n_steps:  # whose leaves want no gradient
            return
        with constant(parameters_of(self.gradient.module)), self.autocast():
            grads, u = self._evaluate()
        self.u.copy_(u)
        finite = [u.isfinite(), *(flat(grad).isfinite().all(1) for grad in grads)]
        self.finite_start.copy_(torch.stack(finite).all(0))
        for kept, grad in zip(self.grads, grads, strict=True):
            kept.copy_(grad)
        if self.plan.adapt_steps:
            torch.log(self.delta, out=self.log_delta)
            self.log_sum.zero_()

    def run(self, n_steps: int, *, ends: bool) -> None:
        plan = self.plan
        keeps = plan.keep_stats or plan.keep_trajectory
        with constant(parameters_of(self.gradient.module)), self.autocast():
            for step in range(n_steps):
                if not plan.adapt_steps:
                    self._set_delta(step)
                self._propose(step)
                log_ratio, accepted = self._accept(step)
                if keeps:
                    self._record(step, log_ratio, accepted)
                if plan.adapt_steps:
                    self._adapt(step, log_ratio)

    def _set_delta(self, step: int) -> None:
        value = self.coefficients["step_size"]
        if isinstance(value, Tensor):
            self.delta.copy_(table_row(value, step))
        elif step == 0:
            self.delta.fill_(value)
        else:
            return
        self._derive()

    def _derive(self) -> None:
        torch.mul(self.delta, self.delta, out=self.drift[0]).div_(2)
        torch.mul(self.delta, self.plan.temperature**0.5, out=self.noise[0])

    def _propose(self, step: int) -> None:
        for j, move in enumerate(self.propose):
            self.xs[j].copy_(self.current[j])
            move(self.grads[j], step)

    def _evaluate(self) -> tuple[Tensors, Tensor]:
        """∇U, and U (B,) in at least float32, at the proposals."""
        grads, value = self.bound_gradient(self.inputs.model_kwargs)
        assert value is not None
        if self.gradient.is_score:
            grads = tuple(-grad for grad in grads)
        return grads, self.gradient.sign * value.to(self.u.dtype)

    def _accept(self, step: int) -> tuple[Tensor, Tensor]:
        """The logarithm of each proposal's ratio, and whether it was accepted, (B,)."""
        grads, u = self._evaluate()
        log_ratio = self._log_ratio(grads, u)
        uniform = ops.uniform((len(u),), self.rngs[-1], step=step)
        accepted = uniform.log() < log_ratio  # false where the ratio is NaN
        torch.where(accepted, u, self.u, out=self.u)
        for x, y, kept, grad in zip(self.current, self.xs, self.grads, grads, strict=True):
            chains = per_chain_view(accepted, x)
            torch.where(chains, y, x, out=x)
            torch.where(chains, grad.to(kept.dtype), kept, out=kept)
        return log_ratio, accepted

    def _log_ratio(self, grads: Tensors, u: Tensor) -> Tensor:
        """log of p(y) q(x|y) / (p(x) q(y|x)), (B,), of proposals y with these gradients and U."""
        drift = self.drift[0][:, None]
        terms = []
        for x, y, grad, grad_y in zip(self.current, self.xs, self.grads, grads, strict=True):
            move = flat(y - x).to(u.dtype)
            forward = (move + drift * flat(grad)).square().sum(1)
            backward = (-move + drift * flat(grad_y)).square().sum(1)
            terms.append(forward - backward)
        proposals = reduce(torch.add, terms) / (2 * self.delta * self.delta)
        log_ratio = (self.u - u + proposals) / self.plan.temperature
        return torch.where(u.isfinite(), log_ratio, -torch.inf)

    def _record(self, step: int, log_ratio: Tensor, accepted: Tensor) -> None:
        self.records.keep(step, self.current, None)
        for sums in self.records.sums:
            squares = torch.zeros_like(self.u)
            for grad in self.grads:
                squares = squares + flat(grad).to(self.u.dtype).square().sum(1)
            acceptance = _probability(log_ratio)
            columns = self.u, squares, acceptance, accepted.to(self.u.dtype), self.delta
            torch.stack(columns, dim=1, out=sums[step])

    def _adapt(self, step: int, log_ratio: Tensor) -> None:
        """One step of stochastic approximation (Andrieu and Thoms, Stat. Comput. 2008): log δ moves
        toward the target, and in the end becomes the mean over the second half of its path. After
        the last such step nothing moves."""
        gain, counts, last = (
            table_row(self.coefficients[name], step)  # type: ignore[arg-type]
            for name in ("gain", "counts", "last")
        )
        missed = _probability(log_ratio) - self.plan.target_accept
        self.log_delta.addcmul_(missed, gain.to(self.u.dtype))
        self.log_sum.addcmul_(self.log_delta, counts.to(self.u.dtype))
        mean = self.log_sum / ((self.plan.adapt_steps + 1) // 2)  # of so many steps
        torch.where(last > 0, mean, self.log_delta, out=self.log_delta)
        torch.exp(self.log_delta, out=self.delta)
        self._derive()


def _probability(log_ratio: Tensor) -> Tensor:
    """With which a proposal is accepted."""
    return log_ratio.nan_to_num(-torch.inf).exp().clamp(max=1)


def _adaptation(n_steps: int, adapt_steps: int) -> dict[str, Coefficient]:
    """For each step: how far log δ moves, whether it counts for the mean, and whether that is taken
    there."""
    if not adapt_steps:
        return {}
    steps = torch.arange(n_steps, dtype=torch.float64, device="cpu")[:, None]
    adapts = steps < adapt_steps
    return {
        "gain": torch.where(adapts, (steps + 1) ** -0.6, 0.0),
        "counts": (adapts & (2 * steps + 1 >= adapt_steps)).double(),
        "last": (steps + 1 == adapt_steps).double(),
    }


def _statistics(columns: Tensor) -> MALAStatistics:
    """Those of a chain, (T, B, 5)."""
    energy, squares, acceptance, accepted, step_size = columns.unbind(-1)
    return MALAStatistics(energy, squares.sqrt(), acceptance, accepted != 0, step_size)


def _check_start(xs: Tensors, finite: Tensor) -> None:
    """``finite``: (B,), whether the energy and its gradient are finite at the start: one read."""
    if not bool(finite.all()):
        raise nonfinite_error(
            finite, torch.zeros_like(finite, dtype=torch.int64), xs,
            what="the energy or its gradient", advice="start the chains where both are finite",
        )  # fmt: skip
