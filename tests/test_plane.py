"""Runs on toy densities."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from coopflow_ext import Key, coop
from coopflow_ext.coop.plane import _states, cell_centres, densities, divergence, normalised
from coopflow_ext.coop.study.report import report_run
from coopflow_ext.data.toy import DENSITIES

image_module = pytest.importorskip("PIL.Image")


def test_divergence() -> None:
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    q = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log()
    assert divergence(p, q) == pytest.approx(math.log(2))
    assert divergence(p, p) == 0
    assert float(normalised(torch.tensor([1.0, 2.0, 3.0])).exp().sum()) == pytest.approx(1)


def test_grid_sees_the_densities_well_enough() -> None:
    """The divergence between two of the densities from a quarter of the cells is the same."""
    results = []
    for cells in (80, 160):
        points = cell_centres(cells)
        tables = [normalised(DENSITIES[n].log_density(points)) for n in ("pinwheel", "8gaussians")]
        results.append(divergence(*tables))
    assert results[0] == pytest.approx(results[1], rel=0.02)


def test_densities_are_without_dropout() -> None:
    config = coop.TrainConfig.from_dict(
        {
            "preset": "toy",
            "flow_options": {"couplings": 2, "widths": [8], "dropout": 0.5},
            "energy_options": {"widths": [8]},
        }
    )
    data = config.load_data()
    model = coop.CoopFlow.from_config(config, coop.model.EventSpec((2,), None))
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(0.1)
    assert model.training
    found = densities(model, data)
    assert model.training
    model.eval()
    expected = model.flow.log_prob(cell_centres()).detach()
    torch.testing.assert_close(found["flow"], normalised(expected))
    torch.testing.assert_close(found["energy"], normalised(-model.energy(cell_centres()).detach()))
    truth = DENSITIES["8gaussians"].log_density(cell_centres())
    torch.testing.assert_close(found["true"], normalised(truth))


def test_toy_run_learns_the_density(tmp_path: Path) -> None:
    """The flow comes nearer to the truth than a Gaussian of the data's moments, the energy nearer
    than the uniform density that it starts from."""
    config = coop.TrainConfig.from_dict(
        {
            "preset": "toy",
            "data": "toy:8gaussians",
            "flow_options": {"couplings": 6, "widths": [32, 32]},
            "energy_options": {"widths": [32, 32]},
            "langevin_steps": 5,
            "pretrain_steps": 120,
            "flow_frozen_steps": 20,
            "steps": 40,
            "warmup_steps": 20,
            "n_samples": 300,
        }
    )
    out = tmp_path / "run"
    summary = coop.train(config, out)
    points = cell_centres()
    std = float(config.load_data().train.std())
    gaussian = normalised(-points.square().sum(1) / (2 * std**2))
    truth = normalised(DENSITIES["8gaussians"].log_density(points))
    assert 0 < summary["kl_true_to_flow"] < divergence(truth, gaussian)
    uniform = normalised(torch.zeros(len(points)))
    assert 0 < summary["kl_true_to_energy"] < divergence(truth, uniform)
    page = report_run(out).read_text()
    assert "data:image/gif;base64," in page
    assert "What was learned of the density" in page
    assert "Divergence of the energy" in page
    assert summary["fd"]["feature_space"] == "identity"
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "densities.png").read_bytes().startswith(b"\x89PNG")
    with image_module.open(out / "chain.gif") as animation:
        assert animation.n_frames == 6
    assert (out / "samples" / "step-0000160.png").exists()


def test_energy_alone_on_a_toy_density_says_nothing_of_a_flow(tmp_path: Path) -> None:
    config = coop.TrainConfig.from_dict(
        {
            "preset": "toy",
            "start": "uniform",
            "flow_options": {"couplings": 2, "widths": [8]},
            "energy_options": {"widths": [8]},
            "langevin_steps": 2,
            "pretrain_steps": 0,
            "flow_frozen_steps": 0,
            "steps": 2,
            "n_samples": 50,
        }
    )
    summary = coop.train(config, tmp_path / "run")
    assert math.isfinite(summary["kl_true_to_energy"])
    assert "kl_true_to_flow" not in summary
    assert summary["bits_per_dim"] is None
    assert (tmp_path / "run" / "densities.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [0, 1, 29, 30, 31, 59, 61, 200])
def test_the_animation_ends_where_the_chains_end(steps: int) -> None:
    config = coop.TrainConfig.from_dict(
        {
            "preset": "toy",
            "flow_options": {"couplings": 2, "widths": [8]},
            "energy_options": {"widths": [8]},
            "langevin_steps": steps,
        }
    )
    model = coop.CoopFlow.from_config(config, coop.model.EventSpec((2,), None))
    numbers, states = zip(*_states(model, Key(0)), strict=True)
    gaps = [b - a for a, b in itertools.pairwise(numbers)]
    assert (numbers[0], numbers[-1]) == (0, steps)
    assert len(set(gaps[:-1])) <= 1
    assert min(steps, 15) < len(numbers) <= 31
    proposals, samples = model.sample_pairs(len(states[0]), Key(0))
    assert torch.equal(states[0], proposals)
    assert torch.equal(states[-1], samples)
