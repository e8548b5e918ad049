"""What the demo must show, over three seeds; and the patches. Long tier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coopflow_ext import coop


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_demo(tmp_path: Path, seed: int) -> None:
    config = coop.TrainConfig.from_dict({"preset": "digits-small", "seed": seed})
    summary = coop.train(config, tmp_path / "run")
    fd = summary["fd"]
    assert fd["classifier_accuracy"] >= 0.97
    assert fd["held_out"] < fd["langevin"] < fd["flow"]
    assert fd["langevin"] <= 0.7 * fd["flow"]
    assert fd["langevin"] <= 1.5 * fd["held_out"]
    assert fd["flow"] <= 0.2 * fd["flow_start"]
    bits = list(summary["pretraining_bits_per_dim"].values())
    assert len(bits) == 4
    assert max(bits[1:]) < 0.9 * bits[0]
    assert summary["moment_gap"] < 0.5 * summary["moment_gap_start"]
    # Both models learn to the last step: the last checkpoints differ in both.
    run = coop.RunFolder.open(tmp_path / "run")
    (_, older), (_, last) = run.checkpoints()
    a, b = (coop.CoopFlow.load(path).state_dict() for path in (older, last))
    for name in ("flow.", "energy."):
        assert any(k.startswith(name) and not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_patches_stay_finite_and_their_energies_bounded(tmp_path: Path) -> None:
    config = coop.TrainConfig.from_dict({"preset": "patches-small"})
    summary = coop.train(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    energies = [
        abs(line[name])
        for line in map(json.loads, lines)
        for name in ("energy_data", "energy_samples")
        if name in line
    ]
    assert len(energies) >= 20
    assert max(energies) < 100
    assert (tmp_path / "run" / summary["picture"]).read_bytes().startswith(b"\x89PNG")
