"""What a run on data in the plane learned: densities on a grid, pictures, an animation."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coopflow_ext._optional import require
from coopflow_ext.coop.config import START_NAMES
from coopflow_ext.coop.files import write_atomically
from coopflow_ext.coop.model import CoopFlow, build_sampler
from coopflow_ext.coop.pictures import figure_bytes, scatter
from coopflow_ext.data import Dataset
from coopflow_ext.data.toy import DENSITIES, EXTENT
from coopflow_ext.rng import USE_EVALUATION, Key

_CELLS = 160
_POINTS = 2000
_FRAMES = 30


def cell_centres(cells: int = _CELLS) -> Tensor:
    """Centres of a cells × cells grid over [−4, 4]², (cells², 2) float32, x₁ slowest."""
    centre = (torch.arange(cells) + 0.5) * (2 * EXTENT / cells) - EXTENT
    return torch.cartesian_prod(centre, centre)


def normalised(log_density: Tensor) -> Tensor:
    """log of the probability of each cell, float64, from an unnormalised log-density."""
    log_density = log_density.double()
    return log_density - log_density.logsumexp(0)


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p ‖ q) in nats between two tables of log-probabilities; 0·log 0 = 0."""
    inside = log_p > -math.inf
    p = log_p[inside]
    return float((p.exp() * (p - log_q[inside])).sum())


@torch.no_grad()
def densities(model: CoopFlow, data: Dataset) -> dict[str, Tensor]:
    """log-probability of each cell under the true density, the energy and, where it learns, the
    flow, (cells²,) each."""
    device = next(model.parameters()).device
    points = cell_centres().to(device)
    name = data.name.partition(":")[2]
    with model.evaluating():
        tables = {
            "true": normalised(DENSITIES[name].log_density(points.cpu())),
            "energy": normalised(-model.energy(points).cpu()),
        }
        if _start(model) == "flow":
            tables["flow"] = normalised(model.flow.log_prob(points, key=Key(0)).cpu())
    return tables


def _start(model: CoopFlow) -> str:
    assert model.config is not None
    return model.config.start


def report_plane(model: CoopFlow, data: Dataset, out: Path) -> dict[str, float]:
    """Write densities.png and chain.gif into ``out``; return the divergences from the truth."""
    tables = densities(model, data)
    key = Key(0).fold_in(USE_EVALUATION)
    proposals, samples = model.sample_pairs(_POINTS, key)
    points = {
        "held-out data": data.held_out[:_POINTS],
        START_NAMES[_start(model)]: proposals,
        "after Langevin": samples,
    }
    write_atomically(out / "densities.png", _picture(tables, points))
    write_atomically(out / "chain.gif", _animation(model, key))
    truth = tables.pop("true")
    return {f"kl_true_to_{name}": divergence(truth, table) for name, table in tables.items()}


def _picture(tables: dict[str, Tensor], points: dict[str, Tensor]) -> bytes:
    figure_module = require("matplotlib.figure", extra="train", distribution="matplotlib")
    figure = figure_module.Figure(figsize=(11, 7.5), layout="constrained")
    above, below = figure.subplots(2, 3)
    above[-1].set_visible(len(tables) == 3)
    for axes, (name, table) in zip(above, tables.items(), strict=False):
        image = table.exp().view(_CELLS, _CELLS).T.numpy()
        box = (-EXTENT, EXTENT, -EXTENT, EXTENT)
        axes.imshow(image, origin="lower", extent=box, cmap="magma")
        axes.set_title(f"density: {name}", fontsize=10)
    for axes, (title, x) in zip(below, points.items(), strict=True):
        scatter(axes, x, title)
    return figure_bytes(figure)


def _animation(model: CoopFlow, key: Key) -> bytes:
    """The chains from the proposals to the samples, one frame for every step or every few."""
    figure_module = require("matplotlib.figure", extra="train", distribution="matplotlib")
    image = require("PIL.Image", extra="train", distribution="pillow")
    frames = []
    for step, x in _states(model, key):
        figure = figure_module.Figure(figsize=(4, 4), layout="constrained")
        scatter(figure.subplots(), x, f"step {step}")
        picture = image.open(io.BytesIO(figure_bytes(figure, dpi=70)))
        frames.append(picture.convert("P", palette=image.Palette.ADAPTIVE))
    buffer = io.BytesIO()
    frames[0].save(
        buffer, format="GIF", save_all=True, append_images=frames[1:], duration=120, loop=0
    )
    return buffer.getvalue()


def _states(model: CoopFlow, key: Key) -> list[tuple[int, Tensor]]:
    """(step, points) along the chain: its start, its end, and at most 29 states between."""
    assert model.config is not None
    assert model.event is not None
    steps = model.config.langevin_steps
    thin = max(1, math.ceil(steps / _FRAMES))
    options: dict[str, Any] = {"return_trajectory": True, "thin": thin}
    sampler = build_sampler(model.config, model.energy, model.event, training=False, **options)
    with model.evaluating():
        start = model.propose(_POINTS // 2, key)
        out = sampler(start, key=key)
    assert isinstance(out.x, Tensor)
    assert isinstance(out.trajectory, Tensor)
    kept = dict(zip(range(thin, steps + 1, thin), out.trajectory, strict=True))
    states = {0: start, **kept, steps: out.x}
    return [(step, x.cpu()) for step, x in states.items()]
