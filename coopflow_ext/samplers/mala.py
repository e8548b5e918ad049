"""The Metropolis-adjusted Langevin algorithm: Langevin proposals with exact acceptance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext._tensors import arithmetic_dtype, flat, per_chain_view, room_for, table_row
from coopflow_ext.rng import USE_ACCEPT, Key
from coopflow_ext.samplers.checks import (
    check_chain_counts,
    check_choice,
    check_count,
    check_flag,
    check_kwargs,
    check_number,
    check_single_state,
    check_steps,
)
from coopflow_ext.samplers.gradient import Gradient, StateFunction, constant, parameters_of
from coopflow_ext.samplers.inputs import normals_like, state_copy
from coopflow_ext.samplers.kernel import Kernel, kernel_for
from coopflow_ext.samplers.output import Trajectory, nonfinite_error
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

    x: Tensor
    key: Key
    trajectory: Tensor | None
    stats: MALAStatistics | None
    step_size: Tensor


class MALASampler:
    """Chains whose stationary distribution is p ∝ exp(−U/temperature) exactly.

    One step proposes y = x − (δ²/2)·∇U(x) + δ·√temperature·ξ and accepts it with probability
    min(1, p(y) q(x|y) / (p(x) q(y|x))); a proposal whose energy or gradient is not finite is
    rejected. Roberts and Tweedie, Bernoulli 2 (1996).

    Args:
        energy: as in :class:`LangevinSampler`; the acceptance needs U, so there is no ``score=``.
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
        kernel: "auto": where a kernel knows the energy, as in :class:`LangevinSampler`, one launch
            makes all the steps. The random numbers are the same; the energy and its gradient differ
            by rounding. True: a ValueError says why it cannot. False: step by step.

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
        kernel: bool | Literal["auto"] = "auto",
    ) -> None:
        check_flag("negative_energy", negative_energy)
        self.gradient = Gradient(energy, None, negative_energy=negative_energy)
        self.n_steps = check_steps(n_steps)
        self.delta = coefficient("step_size", step_size, n_steps)
        self.chain_counts = chain_counts({"step_size": self.delta})
        if not bool((torch.as_tensor(self.delta) > 0).all()):
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
        self.return_trajectory = check_flag("return_trajectory", return_trajectory)
        self.thin = check_count("thin", thin, 1)
        self.stats = check_flag("stats", stats)
        check_choice("kernel", kernel, (True, False, "auto"))
        self.kernel = kernel

    def __call__(
        self,
        x0: Tensor,
        *,
        key: Key | None = None,
        xi: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> MALAOutput:
        """Run the chains from x0 (B, …), which is not modified; arguments as LangevinSampler's.

        Raises:
            NonFiniteError: the energy or its gradient is not finite at x0.
        """
        x0 = check_single_state("MALASampler", x0)
        check_chain_counts(self.chain_counts, len(x0))
        key = Key.or_default(key)
        key.check_batch(len(x0))
        kwargs = check_kwargs(model_kwargs)
        kernel = kernel_for(self.kernel, self.gradient, x0, kwargs)
        if kernel is not None:
            return self._run_kernel(kernel, x0, key, xi)
        return self._run(x0, key, xi, kwargs)

    def _run_kernel(self, kernel: Kernel, x0: Tensor, key: Key, xi: Tensor | None) -> MALAOutput:
        """All the steps in one call."""
        after = key.advance(self.n_steps)
        with torch.inference_mode(False), torch.no_grad():
            x0 = x0.detach().contiguous()
            xis = normals_like(xi, (x0,), self.n_steps)
            result = kernel.mala(
                x0,
                rng=key.tensor(x0.device),
                accept_rng=key.fold_in(USE_ACCEPT).tensor(x0.device),
                **kernel.energy,
                n_steps=self.n_steps,
                step_size=place("step_size", self.delta, x0),
                temperature=self.temperature,
                adapt_steps=self.adapt_steps,
                target_accept=self.target_accept,
                negative_energy=self.gradient.sign < 0,
                xi=None if xis is None else xis[0],
                thin=self.thin if self.return_trajectory else None,
                stats=self.stats,
            )
            _check_start(x0, result.finite)
            stats = None if result.stats is None else _statistics(result.stats)
        return MALAOutput(result.x, after, result.trajectory, stats, result.step_size)

    def _run(
        self, x0: Tensor, key: Key, xi: Tensor | None, kwargs: Mapping[str, Any]
    ) -> MALAOutput:
        """Step by step."""
        after = key.advance(self.n_steps)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            constant(parameters_of(self.gradient.module)),
        ):
            x, y = state_copy(x0), state_copy(x0)
            xis = normals_like(xi, (x,), self.n_steps)
            rng, accept_rng = key.tensor(x.device), key.fold_in(USE_ACCEPT).tensor(x.device)
            steps = _StepSizes(self, x)
            trajectory = Trajectory(x, self.n_steps, self.thin, keep=self.return_trajectory)
            u, grad = self._evaluate(x, kwargs)
            _check_start(x, u.isfinite() & flat(grad).isfinite().all(1))
            stats = _empty_statistics(u, self.n_steps) if self.stats else None
            for step in range(self.n_steps):
                ops.langevin_step_(
                    y.copy_(x), grad, rng, drift=steps.drift, noise=steps.noise, step=step,
                    xi=None if xis is None else xis[0][step],
                )  # fmt: skip
                u_y, grad_y = self._evaluate(y, kwargs)
                delta = steps.at(step)
                log_ratio = self._log_ratio(x, u, grad, y, u_y, grad_y, delta)
                uniform = ops.uniform((len(x),), accept_rng, step=step)
                accepted = uniform.log() < log_ratio  # false where the ratio is NaN
                u = torch.where(accepted, u_y, u)
                chains = per_chain_view(accepted, x)
                torch.where(chains, y, x, out=x)
                torch.where(chains, grad_y, grad, out=grad)
                acceptance = log_ratio.nan_to_num(-torch.inf).exp().clamp(max=1)
                trajectory.record(step, x)
                if stats is not None:
                    norm = flat(grad).norm(dim=1)
                    row = MALAStatistics(u, norm, acceptance, accepted, delta)
                    for name, column in vars(stats).items():
                        column[step].copy_(getattr(row, name))
                if step < self.adapt_steps:
                    steps.adapt(step, acceptance)
        last = steps.at(max(self.n_steps - 1, 0)).clone()
        return MALAOutput(x, after, trajectory.states, stats, last)

    def _evaluate(self, x: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """U (B,) in at least float32, and ∇U in x's layout, in memory of its own."""
        leaf = x.detach().requires_grad_()
        (grad,), value = self.gradient((leaf,), leaf, kwargs)
        assert value is not None
        laid_out = torch.empty_like(x).copy_(-grad if self.gradient.is_score else grad)
        return self.gradient.sign * value.to(arithmetic_dtype(x.dtype)), laid_out

    def _log_ratio(
        self, x: Tensor, u: Tensor, grad: Tensor, y: Tensor, u_y: Tensor, grad_y: Tensor,
        delta: Tensor,
    ) -> Tensor:  # fmt: skip
        """log of p(y) q(x|y) / (p(x) q(y|x)), (B,)."""
        move = flat(y - x).to(u.dtype)
        drift = (delta * delta / 2)[:, None]
        forward = (move + drift * flat(grad)).square().sum(1)
        backward = (-move + drift * flat(grad_y)).square().sum(1)
        proposals = (forward - backward) / (2 * delta * delta)
        log_ratio = (u - u_y + proposals) / self.temperature
        return torch.where(u_y.isfinite(), log_ratio, -torch.inf)


class _StepSizes:
    """δ of each chain, and the coefficients that follow from it."""

    def __init__(self, sampler: MALASampler, x: Tensor) -> None:
        delta = place("step_size", sampler.delta, x)
        table = torch.as_tensor(delta, dtype=arithmetic_dtype(x.dtype), device=x.device)
        rows = table.shape[0] if table.ndim == 2 else 1
        self.delta = table.expand(rows, len(x)).clone()
        self._scale = sampler.temperature**0.5
        self._steps, self._target = sampler.adapt_steps, sampler.target_accept
        self._log = self.delta[0].log()
        self._sum, self._count = torch.zeros_like(self._log), 0
        self._derive()

    def _derive(self) -> None:
        self.drift = self.delta * self.delta / 2
        self.noise = self.delta * self._scale

    def at(self, step: int) -> Tensor:
        return table_row(self.delta, step)

    def adapt(self, step: int, acceptance: Tensor) -> None:
        """One step of stochastic approximation (Andrieu and Thoms, Stat. Comput. 2008)."""
        self._log += (acceptance - self._target) * (step + 1) ** -0.6
        if 2 * step + 1 >= self._steps:
            self._sum += self._log
            self._count += 1
        last = step + 1 == self._steps
        self.delta[0] = (self._sum / self._count if last else self._log).exp()
        self._derive()


def _empty_statistics(u: Tensor, n_steps: int) -> MALAStatistics:
    shape = 4, n_steps, len(u)
    with room_for("statistics", shape, u.dtype):
        energy, grad_norm, acceptance, step_size = u.new_empty(shape)
    accepted = torch.empty_like(energy, dtype=torch.bool)
    return MALAStatistics(energy, grad_norm, acceptance, accepted, step_size)


def _statistics(columns: Tensor) -> MALAStatistics:
    """Those of a kernel, (T, B, 5)."""
    energy, squares, acceptance, accepted, step_size = columns.unbind(-1)
    return MALAStatistics(energy, squares.sqrt(), acceptance, accepted != 0, step_size)


def _check_start(x: Tensor, finite: Tensor) -> None:
    """``finite``: (B,), whether the energy and its gradient are finite at x."""
    if not bool(finite.all()):
        raise nonfinite_error(
            finite, torch.zeros_like(finite, dtype=torch.int64), (x,),
            what="the energy or its gradient", advice="start the chains where both are finite",
        )  # fmt: skip
