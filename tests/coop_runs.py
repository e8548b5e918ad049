"""Small trainings for the tests of runs, and what must be the same in two of them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch

from coopflow_ext.coop import RunFolder, TrainConfig
from coopflow_ext.coop.checkpoint import load_checkpoint

# Other processes, forked from one that has imported everything and done nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["coopflow_ext.coop"])

TINY: dict[str, Any] = {
    "preset": "digits-small",
    "flow_options": {"net": "mlp", "couplings": 2, "widths": [16]},
    "energy_options": {"widths": [16, 16]},
    "batch_size": 16,
    "langevin_steps": 3,
    "pretrain_steps": 3,
    "flow_frozen_steps": 2,
    "flow_every": 1,
    "steps": 7,
    "warmup_steps": 2,
    "n_samples": 20,
    "log_every": 2,
    "sample_every": 5,
    "checkpoint_every": 4,
}


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig.from_dict({**TINY, **changes})


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Both runs have logged the same and have come to the same bits."""
    a, b = RunFolder.open(ours), RunFolder.open(theirs)
    assert without_times(a.metrics()) == without_times(b.metrics())
    mine, facts = load_checkpoint(a.latest_checkpoint())
    other, other_facts = load_checkpoint(b.latest_checkpoint())
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    assert facts["key"] == other_facts["key"]


def snapshot(path: Path) -> dict[str, bytes]:
    """What stands in every file of a folder."""
    return {str(p): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
