"""What a training says when the device's memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from coopflow_ext.coop.config import TrainConfig
from coopflow_ext.errors import reason


def savings(config: TrainConfig) -> list[str]:
    """Settings that would take less memory than these, those that cost least first."""
    found = []
    if config.precision == "float32" or config.flow_precision == "float32":
        found.append("precision and flow_precision bfloat16")
    if config.accumulate < config.batch_size:
        found.append(f"accumulate above {config.accumulate}")
    if not config.flow_options.get("recompute"):
        found.append('flow_options {"recompute": true}')
    if config.batch_size > 1:
        found.append(f"batch_size below {config.batch_size}")
    return found


@contextmanager
def naming_memory(config: TrainConfig) -> Iterator[None]:
    """An error for want of memory inside names the batch and the settings that would help."""
    try:
        yield
    except RuntimeError as error:
        # On a CPU torch has no type for it.
        of_a_cpu = "DefaultCPUAllocator" in str(error)
        if not (of_a_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        raise torch.OutOfMemoryError(
            f"a step of the training does not fit the memory at batch_size {config.batch_size}; "
            f"less is taken with {', or '.join(savings(config))} ({reason(error)})"
        ) from error
