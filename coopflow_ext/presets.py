"""The Langevin loops of published energy-based models, each as a :class:`LangevinSampler`.

Every function takes the energy (returning U), the letters of its equation by name, and any option
of :class:`LangevinSampler`, which replaces the loop's own. g = ∇U(x), ξ standard normal, and the
start of the chain is the caller's x0. Where a loop is known by its score s(x, …) = ∇log p, its
function takes that. A repository and a file are named where several loops have the name::

    sampler = cf.presets.jem(energy)
    x = sampler(buffer_samples, key=key).x

Step sizes are schedules like LangevinSampler's: a float, a callable, (T,) or (T or 1, B or 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coopflow_ext._checks import check_count, check_flag, check_number
from coopflow_ext._tensors import Coefficient, as_tensor
from coopflow_ext.samplers.checks import check_steps
from coopflow_ext.samplers.gradient import StateFunction
from coopflow_ext.samplers.langevin import LangevinSampler
from coopflow_ext.samplers.schedule import Schedule, coefficient, per_chain, sqrt

__all__ = [
    "cdrl",
    "clel",
    "coopflow",
    "coopnets",
    "coopvaebm",
    "drl",
    "energy_matching",
    "eqm",
    "hat_ebm",
    "igebm",
    "improved_cd",
    "jem",
    "lebm_posterior",
    "lebm_prior",
    "life_cycle",
    "ncsn",
    "ncsnv2",
    "score_sde_corrector",
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

    step_size is ε, energy_temperature τ, max_step_norm m: the longest step, noise apart. A Gaussian
    reference of the published configurations, which they add behind 1/τ with a deviation σ (their
    ``tau``), is ``reference_std=σ/√τ`` here, where it is part of U.
    Hill et al., AAAI 2022; point0bar1/ebm-life-cycle.
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
        decay = coefficient(
            "decay_noise", lambda k: (n_steps - k - 1) / n_steps if n_steps else 1.0, n_steps
        )
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
    is_final: Tensor | None = None,
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x − ½s_b²(g + (x − x_ref)/σ_b²) + n·s_b·ξ, x_ref given at the call.

    step_size is s_b (for each chain: shape (1, B)), pull_std σ_b (a float or (B,)), noise_scale n:
    1 in training, 0.99 when sampling; chains where is_final, (B,), holds have no pull, which is the
    last level of the file. There the network gives f, of which U = −f/s_b² here, and the end of a
    chain is divided by a_s of its level, except at the last. Gao et al., ICLR 2021;
    ruiqigao/recovery_likelihood, model.py, ``p_sample_langevin``.
    """
    sigma = per_chain("pull_std", pull_std)
    if bool(sigma.min() <= 0) if isinstance(sigma, Tensor) else sigma <= 0:
        raise ValueError("pull_std must be positive")
    s = coefficient("step_size", step_size, n_steps)
    n = check_number("noise_scale", noise_scale, minimum=0.0)
    return _sampler(
        energy,
        overrides,
        n_steps=n_steps,
        drift=s * s / 2,
        noise=n * s,
        pull=(None, _strength(1 / (sigma * sigma), is_final)),
    )


def _strength(strength: float | Tensor, is_final: Tensor | None) -> float | Tensor:
    """Of a pull, a float or (B,): 0 where ``is_final``."""
    strength = torch.as_tensor(strength, dtype=torch.float64, device="cpu")
    if is_final is not None:
        strength = strength * ~as_tensor("is_final", is_final, dtype=torch.bool, device="cpu")
    return strength.reshape(-1) if strength.numel() > 1 else float(strength)


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


# --- loops whose energy or score knows its step ---------------------------------------------------


def _annealed(
    score: Energy,
    overrides: dict[str, Any],
    sigmas: Tensor | Sequence[float],
    n_steps_each: int,
    step_lr: float,
    argument: str,
    **row: Any,
) -> LangevinSampler:
    """n steps at each level σ_i of drift ε·σ_i²/σ_L², the score given its number i."""
    levels, n = _levels(sigmas), check_count("n_steps_each", n_steps_each, 1)
    lr = check_number("step_lr", step_lr, minimum=0.0)
    return _sampler(
        None,
        overrides,
        score=score,
        n_steps=n * len(levels),
        drift=(lr * (levels / levels[-1]).square()).repeat_interleave(n),
        step_kwargs={
            argument: torch.arange(len(levels), device="cpu").repeat_interleave(n)[:, None]
        },
        **row,
    )


def _levels(sigmas: Tensor | Sequence[float]) -> Tensor:
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if levels.ndim != 1 or not len(levels) or not bool(((levels > 0) & levels.isfinite()).all()):
        raise ValueError(f"sigmas must be (L,) positive numbers, got {sigmas!r}")
    return levels


def ncsn(
    score: Energy = None,
    *,
    sigmas: Tensor | Sequence[float],
    n_steps_each: int = 100,
    step_lr: float = 2e-5,
    argument: str = "y",
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x + α_i·s(x, i) + √(2α_i)·ξ, α_i = ε·σ_i²/σ_L²: n steps at each level i = 0 … L − 1.

    sigmas are σ, from large to small, step_lr is ε, n_steps_each n; the score is given i, int64
    (B,), by the name ``argument``. Song and Ermon, NeurIPS 2019; ermongroup/ncsn,
    runners/anneal_runner.py, ``anneal_Langevin_dynamics`` (without the clamp of what it shows).
    """
    return _annealed(score, overrides, sigmas, n_steps_each, step_lr, argument)


def ncsnv2(
    score: Energy = None,
    *,
    sigmas: Tensor | Sequence[float],
    n_steps_each: int = 200,
    step_lr: float = 8e-6,
    argument: str = "y",
    **overrides: Any,
) -> LangevinSampler:
    """:func:`ncsn`, and at the end x⁺ = x + σ_L²·s(x, L − 1): ``denoise=None`` leaves it out.

    Song and Ermon, NeurIPS 2020; ermongroup/ncsnv2, models/__init__.py,
    ``anneal_Langevin_dynamics``.
    """
    last = float(_levels(sigmas)[-1])
    return _annealed(score, overrides, sigmas, n_steps_each, step_lr, argument, denoise=last**2)


def score_sde_corrector(
    score: Energy = None,
    *,
    n_steps: int = 1,
    snr: Schedule = 0.16,
    alpha: Schedule = 1.0,
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x + α·s(x, t) + √(2α)·ξ, α = 2·alpha·(r·‖ξ‖/‖s‖)², the norms means over the batch.

    snr is r; alpha is 1 for variance-exploding noise, 1 − β_t of the time for variance-preserving.
    ``snr_over="chain"`` takes each chain's own norms instead. t is given at the call, as
    ``model_kwargs`` or, for a sweep of times, ``step_kwargs``. Song et al., ICLR 2021;
    yang-song/score_sde_pytorch, sampling.py, ``LangevinCorrector``: its x, not its x_mean.
    """
    ratio = coefficient("snr", snr, n_steps) * sqrt(coefficient("alpha", alpha, n_steps))
    row: dict[str, Any] = {"n_steps": n_steps, "snr": ratio, "snr_over": "batch"}
    return LangevinSampler(None, **{**row, "score": score, **overrides})


def lebm_prior(
    energy: Energy = None,
    *,
    n_steps: int = 60,
    step_size: Schedule = 0.4,
    reference_std: float = 1.0,
    **overrides: Any,
) -> LangevinSampler:
    """z⁺ = z − ½s²(g + z/σ²) + sξ, g = ∇f(z) of the prior exp(−f(z))·N(0, σ²I) of a latent space.

    step_size is s, reference_std σ. Pang et al., NeurIPS 2020; bpucla/latent-space-EBM-prior,
    train_svhn.py, ``sample_langevin_prior_z``.
    """
    return _sampler(
        energy, overrides, n_steps=n_steps, step_size=step_size, reference_std=reference_std
    )


class _Posterior(nn.Module):
    """f(z) + ‖x − G(z)‖²/(2σ²), x given as ``observed``."""

    def __init__(
        self, energy: StateFunction, decoder: Callable[[Tensor], Tensor], likelihood_std: float
    ) -> None:
        super().__init__()
        self.energy, self.decoder, self.likelihood_std = energy, decoder, likelihood_std

    def forward(self, z: Tensor, observed: Tensor, **kwargs: Any) -> Tensor:
        error = (observed - self.decoder(z)).reshape(len(z), -1)
        u: Tensor = self.energy(z, **kwargs).reshape(len(z))
        return u + error.square().sum(1) / (2 * self.likelihood_std**2)


def lebm_posterior(
    energy: StateFunction,
    decoder: Callable[[Tensor], Tensor],
    *,
    n_steps: int = 20,
    step_size: Schedule = 0.1,
    reference_std: float = 1.0,
    likelihood_std: float = 0.3,
    **overrides: Any,
) -> LangevinSampler:
    """z⁺ = z − ½s²(∇f(z) + ∇‖x − G(z)‖²/(2σ_x²) + z/σ²) + sξ: :func:`lebm_prior` given an image.

    x is given at the call as ``model_kwargs={"observed": x}``; decoder is G, likelihood_std σ_x.
    Pang et al., NeurIPS 2020; bpucla/latent-space-EBM-prior, train_svhn.py,
    ``sample_langevin_post_z``.
    """
    sigma = check_number("likelihood_std", likelihood_std, minimum=0.0, exclusive=True)
    return _sampler(
        _Posterior(energy, decoder, sigma),
        overrides,
        n_steps=n_steps,
        step_size=step_size,
        reference_std=reference_std,
    )


def cdrl(
    energy: Energy = None,
    *,
    step_size: float | Tensor,
    pull_std: float | Tensor,
    n_steps: int = 15,
    network_scale: float = 1.0,
    is_final: Tensor | None = None,
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x + ½k²·∇f(x) − ½s²·(x − x_ref)/σ² + sξ, f the network, x_ref given at the call.

    step_size is s, pull_std σ (each a float or (B,)), network_scale k; chains where is_final, (B,),
    holds have no pull. The network gives f (larger where data are), of which k²/s² is −U. For a
    level t, whose x_ref is x_t, the file has σ² = 1 − a_t/a_{t−1}, a = sigmoid(logsnr), and
    s = 0.02·k·σ·√(√(1 − a_{t−1})/√(1 − sigmoid(logsnr_max))), and divides the end by
    √(a_t/a_{t−1}), except where is_final. Levels are given beside x: ``model_kwargs={"t": t}``;
    those of a training batch in one call, since s, σ and t may differ between chains.

    Zhu et al., ICLR 2024; AlvinZhuyx/CDRL, main_uncond.py, ``Langevin``.
    """
    sigma, s = per_chain("pull_std", pull_std), per_chain("step_size", step_size)
    if bool(sigma.min() <= 0) if isinstance(sigma, Tensor) else sigma <= 0:
        raise ValueError("pull_std must be positive")
    k = check_number("network_scale", network_scale, minimum=0.0, exclusive=True)
    ratio = s / (k * sigma)
    return _sampler(
        energy,
        {"negative_energy": True, **overrides},
        n_steps=n_steps,
        drift=k * k / 2,
        noise=s,
        pull=(None, _strength(ratio * ratio, is_final)),
    )


def energy_matching(
    energy: Energy = None,
    *,
    epsilon_max: float,
    time_cutoff: float = 1.0,
    n_steps: int = 150,
    step_size: float = 0.01,
    at_data: Tensor | None = None,
    argument: str = "t",
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x − dt·∇V(x, t) + √(2·dt·ε(t))·ξ at times t = 0, dt, 2dt, …; then clamp(x, ±1).

    ε(t) is 0 before time_cutoff τ, then rises as ε_max·(t − τ)/(1 − τ) to ε_max at 1 and remains
    there; chains where at_data, (B,), holds have ε_max at all times. step_size is dt, epsilon_max
    ε_max; the energy is given t, (B,), by the name ``argument``. Balcerak et al., NeurIPS 2025;
    m1balcerak/EnergyMatching, utils_cifar_imagenet.py, ``gibbs_sampling_time_sweep``.
    """
    dt = check_number("step_size", step_size, minimum=0.0, exclusive=True)
    highest = check_number("epsilon_max", epsilon_max, minimum=0.0)
    cutoff = check_number("time_cutoff", time_cutoff)
    times = torch.arange(check_steps(n_steps), dtype=torch.float64, device="cpu") * dt
    ramp = (
        ((times - cutoff) / (1 - cutoff)).clamp(0, 1) if cutoff < 1 else (times >= cutoff).double()
    )
    epsilon = highest * ramp[:, None]
    if at_data is not None:
        flags = torch.as_tensor(at_data, dtype=torch.bool, device="cpu")
        epsilon = torch.where(flags, highest, epsilon)
    return _sampler(
        energy,
        overrides,
        n_steps=n_steps,
        drift=dt,
        noise=(2 * dt * epsilon).sqrt(),
        clamp=(-1.0, 1.0),
        clamp_when="end",
        step_kwargs={argument: times[:, None]},
    )


def eqm(
    score: Energy = None,
    *,
    n_steps: int = 249,
    step_size: Schedule = 0.0017,
    momentum: float | None = None,
    **overrides: Any,
) -> LangevinSampler:
    """x⁺ = x + η·f(x): descent along the network's field f, given as the score.

    With momentum μ, f is taken at x + ημ·f of the step before. step_size is η; labels and the scale
    of guidance are given at the call as ``model_kwargs``, the file's times 1, 1 + η, … where the
    network takes them as ``step_kwargs``. Wang and Du, 2025; raywang4/EqM, sample_gd.py, samplers
    gd and ngd (whose μ is 0.3).
    """
    drift = coefficient("step_size", step_size, n_steps)
    row: dict[str, Any] = {"n_steps": n_steps, "drift": drift, "noise": 0.0}
    if momentum is not None:
        row.update(momentum=momentum, nesterov=True)
    return _sampler(None, overrides, score=score, **row)
