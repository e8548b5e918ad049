"""Which data a run was trained with, as its checkpoints say it."""

from __future__ import annotations

from typing import Any

from coopflow_ext.data import Dataset
from coopflow_ext.errors import RunError

_KEY = "events"


def data_facts(data: Dataset) -> dict[str, Any]:
    """For a checkpoint: how many events each split has, and a digest of them all."""
    splits = {"train": len(data.train), "held_out": len(data.held_out)}
    return {_KEY: {**splits, "sha256": data.digest}}


def check_same_data(metadata: dict[str, Any], data: Dataset) -> None:
    """RunError where a checkpoint says that its run had other data: what was held out then may be
    trained on now. Older versions wrote no digest, or nothing."""
    now = data_facts(data)[_KEY]
    before = {**now, **metadata.get(_KEY, {})}
    other, digest = before != now, "sha256"
    if other and before.pop(digest) != now.pop(digest) and before == now:
        raise RunError(
            f"the run began with other data: {data.name} has as many events now, but not the same"
        )
    if other:
        raise RunError(
            f"the run began with other data: {before} events, and {data.name} has {now} now"
        )
