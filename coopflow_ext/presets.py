"""The Langevin loops of published energy-based models, each as a :class:`LangevinSampler`.

Every function takes the energy (returning U), the letters of its equation by name, and any option
of :class:`LangevinSampler`, which replaces the loop's own. g = ∇U(x), ξ standard normal, and the
start of the chain is the caller's x0::

    sampler = cf.presets.jem(energy)
    x = sampler(buffer_samples, key=key).x

Step sizes are schedules like LangevinSampler's: a float, a callable, (T,) or (T or 1, B or 1).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from coopflow_ext._tensors import Coefficient
from coopflow_ext.samplers.checks import check_flag, check_number
from coopflow_ext.samplers.gradient import StateFunction
from coopflow_ext.samplers.langevin import LangevinSampler
from coopflow_ext.samplers.schedule import Schedule, coefficient, per_chain

__all__ = [
    "clel",
    "coopflow",
    "coopnets",
    "coopvaebm",
    "drl",
    "hat_ebm",
    "igebm",
    "improved_cd",
    "jem",
    "life_cycle",
    "short_run",
    "ula",
    "uvadlc",
    "vaebm",
]

Energy = StateFunction | None


def _sampler(
    energy: Energy, overrides: dict[str, Any], *, step_size: Schedule | None = None, **row: Any
) -> LangevinSampler:
    """A row of the table with its overrides. ``step_size`` stands for drift δ²/2 and noise δ,
    of which either may be overridden alone; as an override it replaces both."""
    if "step_size" in overrides:
        row = {name: value for name, value in row.items() if name not in ("drift", "noise")}
    if step_size is not None:
        if overrides.keys() & {"drift", "noise"}:
            delta = coefficient("step_size", step_size, row["n_steps"])
            row.update(drift=delta * delta / 2, noise=delta)
        else:
            row["step_size"] = step_size
    return LangevinSampler(energy, **{**row, **overrides})


def _half_square(step_size: Schedule, n_steps: int) -> Coefficient:
    delta = coefficient("step_size", step_size, n_steps)
    return delta * delta / 2


def coopflow(
    energy: Energy = None, *, n_steps: int = 30, step_size: Schedule = 0.03, **overrides: Any
) -> LangevinSampler:
    """x⁺ = clamp(x − clamp(½δ²g, ±0.1), −1, 1); step_size is δ. Xie et al., ICLR 2022."""
    drift = _half_square(step_size, n_steps)
    return _sampler(
        energy, overrides, n_steps=n_steps, drift=drift, noise=0.0, step_clip=0.1, clamp=(-1.0, 1.0)
    )


def coopnets(
    energy: Energy = None,
    *,
    n_steps: int = 15,
    step_size: Schedule = 0.002,
    reference_std: float = 0.016,
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x − ½δ²(g + x/σ²) + δξ; step_size is δ, reference_std σ. Xie et al., AAAI 2018."""
    return _sampler(
        energy, overrides, n_steps=n_steps, step_size=step_size, reference_std=reference_std
    )


def coopvaebm(
    energy: Energy = None,
    *,
    n_steps: int = 15,
    step_size: Schedule = 0.002,
    reference_std: float = 0.016,
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x − ½δ²(g + x/σ²); step_size is δ, reference_std σ. Xie et al., AAAI 2021."""
    drift = _half_square(step_size, n_steps)
    return _sampler(
        energy, overrides, n_steps=n_steps, drift=drift, noise=0.0, reference_std=reference_std
    )


def short_run(energy: Energy = None, *, n_steps: int = 100, **overrides: Any) -> LangevinSampler:
    """x⁺ = x − g + 0.01ξ, started from U(−1, 1). Nijkamp et al., NeurIPS 2019."""
    return _sampler(energy, overrides, n_steps=n_steps, drift=1.0, noise=0.01)


def life_cycle(
    energy: Energy = None,
    *,
    n_steps: int = 100,
    step_size: Schedule = 0.005,
    energy_temperature: float = 1e-4,
    max_step_norm: float | None = None,
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x − ½ε²·(g/τ, scaled to norm ≤ m/(½ε²) if m is given) + εξ.

    step_size is ε, energy_temperature τ, max_step_norm m: the longest step, noise apart.
    Hill et al., AAAI 2022.
    """
    tau = check_number("energy_temperature", energy_temperature, minimum=0.0, exclusive=True)
    epsilon = coefficient("step_size", step_size, n_steps)
    drift = epsilon * epsilon / (2 * tau)
    row: dict[str, Any] = {"n_steps": n_steps, "drift": drift, "noise": epsilon}
    if max_step_norm is not None:
        if isinstance(drift, Tensor) or drift == 0:
            raise ValueError("max_step_norm needs a constant step_size > 0")
        limit = check_number("max_step_norm", max_step_norm, minimum=0.0, exclusive=True)
        row["grad_norm"] = limit / drift
    return _sampler(energy, overrides, **row)


def hat_ebm(
    energy: Energy = None,
    *,
    n_steps: int = 50,
    step_size: Schedule = 5e-4,
    energy_temperature: float = 1e-8,
    max_step_norm: float | None = 2.5,
    **overrides: Any,
) -> LangevinSampler:
    """:func:`life_cycle` with the settings of Hill et al., NeurIPS 2022."""
    return life_cycle(
        energy,
        n_steps=n_steps,
        step_size=step_size,
        energy_temperature=energy_temperature,
        max_step_norm=max_step_norm,
        **overrides,
    )


def igebm(energy: Energy = None, *, n_steps: int = 60, **overrides: Any) -> LangevinSampler:
    """x′ = x + 0.005ξ; g = ∇U(x′); x⁺ = clamp(x′ − 10·clamp(g, ±0.01), 0, 1).

    Du and Mordatch, NeurIPS 2019.
    """
    return _sampler(
        energy,
        overrides,
        n_steps=n_steps,
        drift=10.0,
        noise=0.005,
        noise_before_gradient=True,
        grad_clip=0.01,
        clamp=(0.0, 1.0),
    )


def uvadlc(energy: Energy = None, *, n_steps: int = 60, **overrides: Any) -> LangevinSampler:
    """x′ = clamp(x + 0.005ξ, ±1); g = ∇U(x′); x⁺ = clamp(x′ − 10·clamp(g, ±0.03), ±1).

    The loop of the UvA Deep Learning tutorial on energy-based models, whose network returns −U:
    give that one with ``negative_energy=True``.
    """
    return _sampler(
        energy,
        overrides,
        n_steps=n_steps,
        drift=10.0,
        noise=0.005,
        noise_before_gradient=True,
        grad_clip=0.03,
        clamp=(-1.0, 1.0),
        clamp_when="both",
    )


def improved_cd(
    energy: Energy = None,
    *,
    n_steps: int = 40,
    decay_noise: bool = False,
    differentiable_last: bool = False,
    noise: Schedule = 0.001,
    **overrides: Any,
) -> LangevinSampler:
    """x′ = x + 0.001·d_k·ξ; g = ∇U(x′); x⁺ = clamp(x′ − 100g, 0, 1).

    d_k is 1, or (T − k − 1)/T with ``decay_noise``. With ``differentiable_last`` gradients flow
    through the last step (the KL term). Du et al., ICML 2021.
    """
    if check_flag("differentiable_last", differentiable_last) and "differentiable" in overrides:
        raise ValueError("differentiable_last and differentiable both say it; give one")
    scale = coefficient("noise", noise, n_steps)
    if check_flag("decay_noise", decay_noise):
        decay = coefficient("decay_noise", lambda k: (n_steps - k - 1) / n_steps, n_steps)
        scale = scale * decay
    return _sampler(
        energy,
        overrides,
        n_steps=n_steps,
        drift=100.0,
        noise=scale,
        noise_before_gradient=True,
        clamp=(0.0, 1.0),
        differentiable="last" if differentiable_last else False,
    )


def clel(energy: Energy = None, *, n_steps: int = 60, **overrides: Any) -> LangevinSampler:
    """x⁺ = clamp(x − 100g + 0.001ξ, 0, 1). Lee et al., ICLR 2023."""
    return _sampler(energy, overrides, n_steps=n_steps, drift=100.0, noise=0.001, clamp=(0.0, 1.0))


def jem(energy: Energy = None, *, n_steps: int = 20, **overrides: Any) -> LangevinSampler:
    """x⁺ = x − g + 0.01ξ, from a buffer of 10,000 chains, 5% of them anew: cf.ReplayBuffer.

    Grathwohl et al., ICLR 2020.
    """
    return _sampler(energy, overrides, n_steps=n_steps, drift=1.0, noise=0.01)


def vaebm(
    energy: Energy = None, *, n_steps: int = 10, step_size: Schedule = 8e-5, **overrides: Any
) -> LangevinSampler:
    """For every tensor of the state: x⁺ = x − ½ηg + √η·ξ; step_size is η.

    Xiao et al., ICLR 2021.
    """
    eta = coefficient("step_size", step_size, n_steps)
    return _sampler(energy, overrides, n_steps=n_steps, drift=eta / 2)


def drl(
    energy: Energy = None,
    *,
    step_size: Schedule,
    pull_std: float | Tensor,
    n_steps: int = 30,
    noise_scale: float = 1.0,
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x − ½s_b²(g + (x − x_ref)/σ_b²) + n·s_b·ξ, x_ref given at the call.

    step_size is s_b (for each chain: shape (1, B)), pull_std σ_b (a float or (B,)), noise_scale n:
    1 in training, 0.99 when sampling. Gao et al., ICLR 2021.
    """
    sigma = per_chain("pull_std", pull_std)
    if bool(sigma.min() <= 0) if isinstance(sigma, Tensor) else sigma <= 0:
        raise ValueError("pull_std must be positive")
    s = coefficient("step_size", step_size, n_steps)
    n = check_number("noise_scale", noise_scale, minimum=0.0)
    precision = 1 / (sigma * sigma)
    strength = precision[0] if isinstance(precision, Tensor) else precision
    return _sampler(
        energy,
        overrides,
        n_steps=n_steps,
        drift=s * s / 2,
        noise=n * s,
        pull=(None, strength),
    )


def ula(
    energy: Energy = None,
    *,
    n_steps: int,
    step_size: Schedule,
    temperature: Schedule,
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x − ηg + √(2ητ)·ξ, the unadjusted Langevin algorithm; step_size is η."""
    eta = coefficient("step_size", step_size, n_steps)
    return _sampler(energy, overrides, n_steps=n_steps, drift=eta, temperature=temperature)
