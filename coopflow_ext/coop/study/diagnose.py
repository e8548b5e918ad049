"""``coopflow diagnose``: does the theory hold on a finished run?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coopflow_ext._modes import usual_modes
from coopflow_ext._optional import require
from coopflow_ext.coop.files import write_atomically
from coopflow_ext.coop.judge import Judge
from coopflow_ext.coop.model import CoopFlow, build_sampler
from coopflow_ext.coop.pictures import figure_bytes, save_panels
from coopflow_ext.coop.run import open_run
from coopflow_ext.data import Dataset
from coopflow_ext.diagnostics import split_rhat
from coopflow_ext.metrics import RunningMoments, moment_gap
from coopflow_ext.rng import USE_EVALUATION, Key

_SHOWN = 32


@usual_modes()
def diagnose_run(
    path: Path,
    *,
    n: int = 200,
    factors: tuple[int, ...] = (10, 100),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Moment gap, drift of the proposals, and long chains; results in RUN/diagnose.

    Args:
        path: the run.
        n: number of chains.
        factors: lengths of the long chains, in multiples of the T of training, ascending.
        seed: of the chains.
        device: where to run them.

    Returns:
        What RUN/diagnose/summary.json holds: ``moment_gap`` of proposals and samples (law 3: it
        closes in training); ``drift``, the way from proposal to sample at the first and the last
        logged iteration (law 4: the flow follows the chain, so it shrinks); ``long_chains``, for
        1·T and each factor: mean energy, its R-hat over the chains, Fréchet distance.
    """
    if n < 4:
        raise ValueError(f"n must be ≥ 4, got {n}")
    if not factors or list(factors) != sorted(set(factors)) or factors[0] < 2:
        raise ValueError(f"long: factors must be ≥ 2 and ascending, got {factors}")
    run, model, data = open_run(path, device)
    if run.config.langevin_steps < 1:
        raise ValueError("diagnose needs a run with langevin_steps ≥ 1: this one has no chain")
    out = run.study_folder("diagnose")
    key = Key(seed).fold_in(USE_EVALUATION)
    proposals, samples = model.sample_pairs(n, key)
    chains, states = long_chains(model, proposals, factors, key)
    judge = Judge(data, run.config)
    for chain, x in zip(chains, states, strict=True):
        chain["fd"] = judge.distance(x)
    panels = {judge.start_name: proposals[:_SHOWN]}
    for chain, x in zip(chains, states, strict=True):
        panels[f"{chain['factor']}·T"] = x[:_SHOWN]
    save_panels(out / "long_chains.png", panels, columns=4)
    _save_energies(out / "energies.png", chains)
    ways = [line["langevin_distance"] for line in run.metrics() if "langevin_distance" in line]
    summary = {
        "n": n,
        "moment_gap": {
            "proposals": _gap(data, proposals),
            "samples": _gap(data, samples),
        },
        "drift": {"first": ways[0], "last": ways[-1]} if ways else None,
        "energy_of_held_out_data": float(_mean_energy(model, judge.held_out.to(device))),
        "feature_space": judge.space.name,
        "long_chains": [{k: v for k, v in c.items() if k != "trace"} for c in chains],
        "pictures": ["diagnose/long_chains.png", "diagnose/energies.png"],
    }
    return run.write_study(out / "summary.json", summary)


@torch.no_grad()
def _mean_energy(model: CoopFlow, x: Tensor) -> Tensor:
    with model.evaluating():
        mean: Tensor = model.energy(x).mean()
    return mean


def _gap(data: Dataset, x: Tensor) -> float:
    sums = [RunningMoments(data.dim), RunningMoments(data.dim)]
    sums[0].update(data.decode(data.train))
    sums[1].update(x.cpu())
    return moment_gap(*sums)


def long_chains(
    model: CoopFlow, start: Tensor, factors: tuple[int, ...], key: Key
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Run the chains on from ``start`` to T, factors[0]·T, …

    Returns:
        For each length: a dictionary with the factor, the number of steps, the mean energy at its
        end, R-hat of the energy over the second half of the chain, and the trace of the mean
        energy; and the states (n, *event_shape) there.
    """
    assert model.config is not None
    assert model.event is not None
    steps = model.config.langevin_steps
    done, x, trace = 0, start, torch.empty(0, len(start))
    chains, states = [], []
    for factor in (1, *factors):
        sampler = build_sampler(
            model.config,
            model.energy,
            model.event,
            training=False,
            n_steps=factor * steps - done,
            stats=True,
        )
        with model.evaluating():
            result = sampler(x, key=key)
        assert isinstance(result.x, Tensor)
        assert result.stats is not None
        assert result.stats.energy is not None
        x, key, done = result.x, result.key, factor * steps
        trace = torch.cat((trace, result.stats.energy.cpu()))
        half = trace[len(trace) // 2 :]
        rhat = float(split_rhat(half)) if len(half) >= 4 else math.nan
        chains.append(
            {
                "factor": factor,
                "steps": done,
                "energy": float(trace[-1].mean()),
                # Of chains that do not move there is none.
                "energy_rhat": rhat if math.isfinite(rhat) else None,
                "trace": trace.mean(1),
            }
        )
        states.append(x)
    return chains, states


def _save_energies(path: Path, chains: list[dict[str, Any]]) -> None:
    """Mean energy along the longest chain."""
    figure_module = require("matplotlib.figure", extra="train", distribution="matplotlib")
    figure = figure_module.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    trace = chains[-1]["trace"]
    axes.plot(range(1, len(trace) + 1), trace.tolist(), linewidth=1)
    for chain in chains:
        axes.axvline(chain["steps"], color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("Langevin step (dotted: 1·T and the multiples)")
    axes.set_ylabel("mean energy U")
    write_atomically(path, figure_bytes(figure))
