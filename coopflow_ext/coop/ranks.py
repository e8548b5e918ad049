"""Data-parallel training: which rows of a batch are this process's, and what is shared."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coopflow_ext._recording import between_graphs
from coopflow_ext.errors import RunError


@dataclass(frozen=True)
class Ranks:
    """This process among ``world`` of them.

    Messages of tensors alone go between the graphs of a step that is captured; what returns a
    number of Python belongs outside of it.

    Every process holds rows [rank·B/world, (rank+1)·B/world) of a batch of B, and its keys the
    number of its first row as their chain, so that all of them together draw the noise of one
    process with the whole batch.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The process group, or one process where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This process's part of a batch; ValueError when it cannot be cut into equal parts."""
        if batch_size % self.world:
            raise ValueError(
                f"batch_size must be a multiple of the {self.world} processes, got {batch_size}"
            )
        size = batch_size // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in one message."""
        self._reduce(list(tensors), 1 / self.world)

    def total(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one message."""
        self._reduce(list(tensors), 1.0)

    @torch.no_grad()
    def _reduce(self, tensors: list[Tensor], scale: float) -> None:
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.detach().float().flatten() for t in tensors])
        between_graphs(partial(self._all_reduce, flat))
        flat.mul_(scale)
        parts = flat.split([t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def _all_reduce(self, tensor: Tensor) -> None:
        with self._others():
            dist.all_reduce(tensor)

    def copy_from_first(self, module: nn.Module) -> None:
        """Make the module's state that of rank 0, data-dependent initialisation included."""
        if self.world == 1:
            return
        state = module.state_dict()
        for name, tensor in state.items():
            as_bytes = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.clone()
            with self._others():
                dist.broadcast(as_bytes, 0)
            state[name] = as_bytes.to(tensor.dtype)
        module.load_state_dict(state)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        with self._others():
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def check_same(self, what: str, value: str, device: torch.device) -> None:
        """RunError, in every process, unless ``value`` is the same in all of them."""
        if self.world == 1:
            return
        digest = hashlib.sha256(value.encode()).digest()[:8]
        number = int.from_bytes(digest, "big", signed=True)
        ends = torch.tensor([number, ~number], device=device)
        with self._others():
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        highest, lowest = int(ends[0]), ~int(ends[1])
        if highest != lowest:
            raise RunError(f"rank {self.rank}: {what} the same in all {self.world} processes")

    @contextmanager
    def _others(self) -> Iterator[None]:
        """A clear message when another process is gone, or has not answered in the group's time."""
        try:
            yield
        except RuntimeError as error:
            raise RunError(
                f"rank {self.rank}: another of the {self.world} processes stopped, or did not "
                "answer in time; where it trained already, the last checkpoint is whole, go on "
                "from it with --resume "
                f"({error})"
            ) from error


ALONE = Ranks()
"""One process with the whole batch."""


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; yields this process's device."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    options: dict[str, Any] = {"backend": "nccl" if device.startswith("cuda") else "gloo"}
    dist.init_process_group(**options)
    try:
        yield device
    finally:
        dist.destroy_process_group()
