"""Convergence diagnostics of chains, in torch, on the device where the samples are.

Samples are trajectories as the samplers return them: (T, B, *event), draws first, chains second.
Everything is computed in float64. The definitions are those of Vehtari, Gelman, Simpson, Carpenter
and Bürkner, Bayesian Analysis 16 (2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coopflow_ext._checks import check_count
from coopflow_ext._optional import require
from coopflow_ext._tensors import check_tensor, check_tensors
from coopflow_ext.samplers.mala import MALAOutput
from coopflow_ext.samplers.output import SamplerOutput
from coopflow_ext.samplers.underdamped import UnderdampedOutput

__all__ = ["autocorrelation", "ess", "plot", "split_rhat", "to_arviz"]

Output = SamplerOutput | MALAOutput | UnderdampedOutput


def ess(samples: Tensor) -> Tensor:
    """Bulk effective sample size: of rank-normalised split chains, with Geyer's initial monotone
    sequence.

    Args:
        samples: (T, B, *event), T ≥ 4.

    Returns:
        (*event,) float64, at most T·B·log10(T·B); T·B where all samples are equal, NaN where one
        is not finite.

    Raises:
        ValueError: for another shape. TypeError: samples are not floating point.
    """
    return _finite_only(_effective_size, samples, min_chains=1)


def split_rhat(samples: Tensor) -> Tensor:
    """R-hat of chains split in halves: near 1 when all of them agree.

    Args:
        samples: (T, B, *event), T ≥ 4, B ≥ 2.

    Returns:
        (*event,) float64; NaN where a sample is not finite, or all are equal.

    Raises:
        ValueError: for another shape. TypeError: samples are not floating point.
    """
    return _finite_only(lambda x: _potential_scale_reduction(_split(x)), samples, min_chains=2)


def autocorrelation(samples: Tensor, max_lag: int | None = None) -> Tensor:
    """Autocorrelation of each chain at lags 0 … max_lag (default: all, T − 1).

    Args:
        samples: (T, B, *event) or any (T, …).

    Returns:
        (max_lag + 1, …) float64; NaN for a constant chain.

    Raises:
        ValueError: max_lag is not in [0, T − 1], or samples are complex or 0-d.
    """
    check_tensors(samples=samples)
    if samples.is_complex() or samples.ndim == 0:
        raise ValueError(f"samples must be real, (T, …), got {samples.dtype} of {samples.shape}")
    n = samples.shape[0]
    max_lag = n - 1 if max_lag is None else check_count("max_lag", max_lag, 0)
    if max_lag >= n:
        raise ValueError(f"max_lag must be in [0, {n - 1}], got {max_lag}")
    samples = samples.double()
    covariance = _autocovariance(samples)
    constant = samples.amax(0) == samples.amin(0)
    return (covariance / covariance[:1])[: max_lag + 1].masked_fill(constant, torch.nan)


def _finite_only(estimate: Any, samples: Tensor, *, min_chains: int) -> Tensor:
    """``estimate`` of (T, B, E), reshaped to the event; NaN where a sample is not finite."""
    check_tensor("samples", samples)
    if samples.ndim < 2 or samples.shape[0] < 4 or samples.shape[1] < min_chains:
        raise ValueError(
            f"samples must be (T, B, …) with T ≥ 4 draws and B ≥ {min_chains} chains, "
            f"got {tuple(samples.shape)}"
        )
    samples = samples.detach().double()
    flat = samples.flatten(2) if samples.ndim > 2 else samples[..., None]
    if flat.numel() == 0:
        return flat.new_empty(samples.shape[2:])
    result = estimate(flat)
    result = result.masked_fill(~flat.isfinite().all(0).all(0), torch.nan)
    event: Tensor = result.reshape(samples.shape[2:])
    return event


def _split(x: Tensor) -> Tensor:
    """Each chain's first and second half as chains of their own; an odd middle draw is dropped."""
    half = x.shape[0] // 2
    return torch.cat([x[:half], x[-half:]], dim=1)


def _rank_normalised(x: Tensor) -> Tensor:
    """Normal scores of the ranks over all draws and chains; ties get their mean rank."""
    n, events = x.shape[0] * x.shape[1], x.shape[2]
    values = x.reshape(n, events).T.contiguous()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    upto = torch.searchsorted(ordered, values, right=True)
    rank = (below + upto + 1).double() / 2
    scores: Tensor = torch.special.ndtri((rank - 0.375) / (n + 0.25))
    return scores.T.reshape(x.shape)


def _autocovariance(x: Tensor) -> Tensor:
    """Biased autocovariance along dimension 0 at every lag, by FFT."""
    n = x.shape[0]
    spectrum = torch.fft.rfft(x - x.mean(0), n=2 * n, dim=0)
    power = spectrum * spectrum.conj()
    covariance: Tensor = torch.fft.irfft(power, n=2 * n, dim=0)
    return covariance[:n] / n


def _potential_scale_reduction(x: Tensor) -> Tensor:
    draws = x.shape[0]
    # From a draw on, so that what is constant has no variance by rounding.
    between = draws * (x - x[:1, :1]).mean(0).var(0)
    within = (x - x[:1]).var(0).mean(0)
    return ((between / within + draws - 1) / draws).sqrt()


def _effective_size(samples: Tensor) -> Tensor:
    x = _rank_normalised(_split(samples))
    draws, chains = x.shape[:2]
    total = draws * chains
    covariance = _autocovariance(x).mean(1)
    within = covariance[0] * draws / (draws - 1)
    variance = covariance[0] + (x.mean(0).var(0) if chains > 1 else 0)
    rho = 1 - (within - covariance) / variance
    rho[0] = 1
    # Geyer: sums of pairs (2k, 2k + 1) are taken while positive, then made monotone.
    n_pairs = max((draws - 1) // 2, 1)
    even, odd = rho[0 : 2 * n_pairs : 2], rho[1 : 2 * n_pairs : 2]
    pairs = even + odd
    positive = (pairs > 0).cumprod(0).bool()
    count = positive.sum(0).clamp(max=n_pairs - 1)
    index = torch.arange(n_pairs, device=x.device)[:, None]
    kept = pairs.cummin(0).values.masked_fill(index >= count, 0).sum(0)
    # The even member of the first pair not taken whole still improves the estimate.
    last = even.gather(0, count[None])[0]
    tau = -1 + 2 * kept + last.clamp(min=0)
    floor = 1 / torch.log10(torch.tensor(float(total), device=x.device, dtype=x.dtype))
    size = total / tau.clamp(min=floor)
    constant = samples.amax((0, 1)) == samples.amin((0, 1))
    return size.masked_fill(constant, float(samples.shape[0] * samples.shape[1]))


def to_arviz(out: Output, *, thin: int = 1) -> Any:
    """The trajectory and the statistics as ``arviz.InferenceData``, with arviz ≥ 1 as the
    ``xarray.DataTree`` that it has instead.

    Args:
        out: of any sampler with ``return_trajectory=True``. Tensors of a state of several are named
            x0, x1, …; a single one x. Where there are statistics, a start that the trajectory
            includes is left out: it has none.
        thin: of that sampler; statistics are taken at the steps whose states were kept.

    Raises:
        ValueError: there is no trajectory, or it cannot be one of this thin.
        ImportError: arviz is not installed.
    """
    check_count("thin", thin, 1)
    _check_output(out)
    arviz = require("arviz", extra="diagnostics")
    if out.trajectory is None:
        raise ValueError("out has no trajectory; make the sampler with return_trajectory=True")
    if isinstance(out.trajectory, Tensor):
        states = {"x": out.trajectory}
    else:
        states = {f"x{j}": states for j, states in enumerate(out.trajectory)}
    groups = {"posterior": {name: _chain_first(x) for name, x in states.items()}}
    if out.stats is not None:
        kept = len(next(iter(states.values())))
        columns = {k: v[thin - 1 :: thin] for k, v in vars(out.stats).items() if v is not None}
        (rows,) = {len(column) for column in columns.values()}
        if kept == rows + 1:
            groups["posterior"] = {name: _chain_first(x[1:]) for name, x in states.items()}
        elif kept != rows:
            raise ValueError(f"thin={thin} does not fit a trajectory of {kept} states")
        groups["sample_stats"] = {name: _chain_first(v) for name, v in columns.items()}
    if arviz.__version__.startswith("0."):
        return arviz.from_dict(**groups)
    return arviz.from_dict(groups)


def _check_output(out: object) -> None:
    if not isinstance(out, Output):
        raise TypeError(f"out must be what a sampler returns, got {type(out).__name__}")


def _chain_first(x: Tensor) -> Any:
    x = x.float() if x.dtype == torch.bfloat16 else x  # which numpy does not have
    return x.detach().transpose(0, 1).cpu().numpy()


def plot(out: Output, *, max_chains: int = 16) -> Any:
    """Energy and gradient norm over the steps: some chains, and the median of all.

    Args:
        out: of any sampler with ``stats=True``.
        max_chains: number of chains drawn singly.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: there are no statistics.
        ImportError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", extra="train", distribution="matplotlib")
    _check_output(out)
    check_count("max_chains", max_chains, 0)
    if out.stats is None:
        raise ValueError("out has no statistics; make the sampler with stats=True")
    traces = {"energy": out.stats.energy, "gradient norm": out.stats.grad_norm}
    shown = {name: trace.detach().cpu() for name, trace in traces.items() if trace is not None}
    figure = figures.Figure(figsize=(7, 2.5 * len(shown)), layout="constrained")
    for axis, (name, trace) in zip(
        figure.subplots(len(shown), 1, sharex=True, squeeze=False).flat, shown.items(), strict=True
    ):
        axis.plot(trace[:, :max_chains].numpy(), color="0.7", linewidth=0.8)
        axis.plot(trace.median(1).values.numpy(), color="C0", label="median of the chains")
        axis.set_ylabel(name)
        axis.legend(loc="upper right")
    figure.axes[-1].set_xlabel("step")
    return figure
