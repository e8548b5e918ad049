"""Whole Langevin and MALA chains of an energy in closed form, in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coopflow_ext._checks import check_sequence
from coopflow_ext._tensors import Coefficient
from coopflow_ext.ops import _call
from coopflow_ext.ops._langevin_chain import (
    ChainResult,
    MALAResult,
    fake_mala_results,
    fake_results,
    run_chain,
    run_mala_chain,
)

MOST_ELEMENTS_ON_CUDA = 64
"""Of a chain on CUDA, where a thread holds it; a CPU has no limit."""


def analytic_langevin_chain(
    x0: Tensor,
    rng: Tensor,
    *,
    energy: str,
    tensors: Sequence[Tensor] = (),
    numbers: Sequence[float] = (),
    n_steps: int,
    drift: Coefficient,
    noise: Coefficient = 0.0,
    decay: Coefficient = 0.0,
    pull: Coefficient = 0.0,
    x_ref: Tensor | None = None,
    grad_clip: float | None = None,
    grad_norm: float | None = None,
    step_clip: float | None = None,
    clamp: tuple[float, float] | None = None,
    clamp_end: bool = False,
    negative_energy: bool = False,
    step: int = 0,
    xi: Tensor | None = None,
    thin: int | None = None,
    stats: bool = False,
    freeze_nonfinite: bool = False,
) -> ChainResult:
    """All the steps of Langevin chains whose energy is known in closed form.

    Equivalent to, with the energy's U::

        x = x0
        for k in range(n_steps):
            x = langevin_step(x, grad U(x), rng, step=step + k, xi=xi[k], …)

    up to the rounding of U's gradient; a chain's results do not depend on the others.

    ========================  =================================================  =================
    energy                    tensors, of x0's dtype                             numbers
    ========================  =================================================  =================
    ``"double_well"``         –                                                  barrier_height
    ``"funnel"``              –                                                  scale > 0
    ``"gaussian"``            mean (D,), precision (D, D), log_norm ()           –
    ``"gaussian_mixture"``    means (K, D), stds (K, D), log_weights (K,)        –
    ``"rastrigin"``           –                                                  a
    ``"rosenbrock"``          –                                                  a, b
    ========================  =================================================  =================

    They are those of :mod:`coopflow_ext.energies`; a precision is symmetric, log_norm is added to
    the energy. The tensors are read when the chain runs.

    Args:
        x0: (B, D), float32 or float64, contiguous; not changed. On CUDA D ≤ 64.
        rng: int64[3] = (seed, time, number of the first chain), see :meth:`Key.tensor`.
        n_steps: T ≥ 0.
        drift, noise, decay, pull: floats, or tables (T or 1, B or 1) whose row ``step + k`` step k
            uses, as in :func:`langevin_step_`.
        x_ref: (B, D), centre of the pull.
        grad_clip, grad_norm, step_clip, clamp: as in :func:`langevin_step_`.
        clamp_end: only the last step clamps.
        negative_energy: the energy is f = −U: the chain climbs it.
        step: number of the first step, in the noise, in tables and in frozen_at.
        xi: (T, B, D), standard normals in place of the key's.
        thin: keep the states after steps thin, 2·thin, …; None keeps none.
        stats: record the statistics of each step.
        freeze_nonfinite: a chain stops before its first step whose gradient is not finite.

    Returns:
        (x, trajectory, stats, frozen_at), see :class:`ChainResult`.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return run_chain(
        "analytic_langevin_chain",
        x0,
        rng,
        _characters("analytic_langevin_chain", energy),
        list(check_sequence("analytic_langevin_chain: tensors", tensors, "tensors")),
        list(check_sequence("analytic_langevin_chain: numbers", numbers, "numbers")),
        n_steps=n_steps,
        drift=drift,
        noise=noise,
        decay=decay,
        pull=pull,
        x_ref=x_ref,
        grad_clip=grad_clip,
        grad_norm=grad_norm,
        step_clip=step_clip,
        clamp=clamp,
        clamp_end=clamp_end,
        negative_energy=negative_energy,
        step=step,
        xi=xi,
        thin=thin,
        stats=stats,
        freeze_nonfinite=freeze_nonfinite,
    )


def analytic_mala_chain(
    x0: Tensor,
    rng: Tensor,
    accept_rng: Tensor,
    *,
    energy: str,
    tensors: Sequence[Tensor] = (),
    numbers: Sequence[float] = (),
    n_steps: int,
    step_size: Coefficient,
    temperature: float = 1.0,
    adapt_steps: int = 0,
    target_accept: float = 0.574,
    negative_energy: bool = False,
    step: int = 0,
    xi: Tensor | None = None,
    thin: int | None = None,
    stats: bool = False,
) -> MALAResult:
    """All the steps of chains by the Metropolis-adjusted Langevin algorithm, whose energy is known
    in closed form.

    Equivalent to, with the energy's U, δ the step size and τ the temperature::

        x = x0
        for k in range(n_steps):
            y = langevin_step(x, grad U(x), rng, drift=δ²/2, noise=δ·√τ, step=step + k, xi=xi[k])
            forward = ((y - x + δ²/2 * grad U(x)) ** 2).sum(1)
            backward = ((x - y + δ²/2 * grad U(y)) ** 2).sum(1)
            log_ratio = (U(x) - U(y) + (forward - backward) / (2 * δ²)) / τ
            accepted = uniform((B,), accept_rng, step=step + k) < exp(log_ratio)
            x = where(accepted, y, x)

    up to rounding, see :func:`coopflow_ext.reference.mala_chain`. A proposal whose energy or
    gradient is not finite is rejected. A chain's results do not depend on the others.

    Args:
        x0: (B, D), float32 or float64, contiguous; not changed. On CUDA D ≤ 64.
        rng: int64[3] = (seed, time, number of the first chain), see :meth:`Key.tensor`.
        accept_rng: the same, of the uniforms that accept.
        energy, tensors, numbers: as in :func:`analytic_langevin_chain`.
        n_steps: T ≥ 0.
        step_size: δ > 0; a float, or a table (T or 1, B or 1) whose row ``step + k`` step k uses.
        temperature: τ > 0.
        adapt_steps: in the first so many steps, move each chain's own δ toward the target
            acceptance, as :class:`MALASampler` does; the step size then has one row.
        target_accept: between 0 and 1.
        negative_energy: the energy is f = −U.
        step: number of the first step, in the noise, in the uniforms and in tables.
        xi: (T, B, D), standard normals in place of the key's.
        thin: keep the states after steps thin, 2·thin, …; None keeps none.
        stats: record the statistics of each step.

    Returns:
        (x, trajectory, stats, step_size, finite), see :class:`MALAResult`.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return run_mala_chain(
        "analytic_mala_chain",
        x0,
        rng,
        accept_rng,
        _characters("analytic_mala_chain", energy),
        list(check_sequence("analytic_mala_chain: tensors", tensors, "tensors")),
        list(check_sequence("analytic_mala_chain: numbers", numbers, "numbers")),
        n_steps=n_steps,
        step_size=step_size,
        temperature=temperature,
        adapt_steps=adapt_steps,
        target_accept=target_accept,
        negative_energy=negative_energy,
        step=step,
        xi=xi,
        thin=thin,
        stats=stats,
    )


def _characters(op: str, energy: str) -> list[int]:
    """The name of an energy as the raw op takes it."""
    if not isinstance(energy, str):
        raise TypeError(f"{op}: energy must be a str, got {type(energy).__name__}")
    return list(energy.encode())


_call.register_fake("analytic_langevin_chain", fake_results)
_call.register_fake("analytic_mala_chain", fake_mala_results)
