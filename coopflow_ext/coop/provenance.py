"""Which data a run was trained with, as its checkpoints say it."""

from __future__ import annotations

from typing import Any

from coopflow_ext.data import Dataset
from coopflow_ext.errors import RunError

_KEY, _DIGEST = "events", "sha256"


def data_facts(data: Dataset) -> dict[str, Any]:
    """For a checkpoint: how many events each split has, and a digest of them all."""
    splits = {"train": len(data.train), "held_out": len(data.held_out)}
    return {_KEY: {**splits, _DIGEST: data.digest}}


def check_same_data(metadata: dict[str, Any], data: Dataset) -> None:
    """RunError where a checkpoint says that its run had other data: what was held out then may be
    trained on now. Older versions wrote no digest, or nothing."""
    now = data_facts(data)[_KEY]
    written = metadata.get(_KEY, {})
    before = {name: written.get(name, value) for name, value in now.items()}
    if before == now:
        return
    began, has = _numbers(before), _numbers(now)
    found = "as many events now, but not the same" if began == has else f"{has} now"
    raise RunError(f"the run began with other data: {began} events, and {data.name} has {found}")


def _numbers(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != _DIGEST}
