"""Batches whose order is a pure function of a key: there is nothing to save or fast-forward."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext._checks import check_count, check_flag
from coopflow_ext.data.dataset import Dataset
from coopflow_ext.rng import USE_AUGMENT, USE_DATA_ORDER, Key


def permutation(n: int, key: Key) -> Tensor:
    """A permutation of range(n), int64 on the CPU, determined by ``key``."""
    check_count("n", n, 0)
    Key.check(key)
    u = ops.uniform((n, 1), key.tensor("cpu"), dtype=torch.float64)
    return u[:, 0].argsort(stable=True)


class Batches:
    """Batch number ``step`` of the training split, for any step, in any order of asking.

    The split is passed through in epochs; each epoch is a fresh permutation and a batch may reach
    over the end of one into the next, so every image is seen equally often.

    Args:
        data: the data set.
        batch_size: rows of a whole batch.
        key: fixes the order and the mirror images; its time is not used.
        device: where batches go.
        flip: mirror each image with probability ½.
        rows: the part of every batch that is returned, for one of several processes; the parts of
            all processes together are the whole batch.

    Raises:
        ValueError: for a batch size below 1, or flip on vectors.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        key: Key,
        *,
        device: torch.device | str = "cpu",
        flip: bool = False,
        rows: slice | None = None,
    ) -> None:
        Key.check(key)
        check_count("batch_size", batch_size, 1)
        if check_flag("flip", flip) and not data.is_image:
            raise ValueError(f"flip is for images, and {data.name} holds vectors")
        self.data = data
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.flip = flip
        self.rows = slice(0, batch_size) if rows is None else rows
        self._order_key = Key(key.fold_in(USE_DATA_ORDER).seed)
        self._flip_key = Key(key.fold_in(USE_AUGMENT).seed)
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            # A batch reaches over at most a few epochs; what lies before them is not asked again.
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = permutation(len(self.data.train), self._order_key.fold_in(epoch))
        return self._epochs[epoch]

    def indices(self, step: int) -> Tensor:
        """Which rows of the training split make up batch ``step`` ≥ 0, int64."""
        if step < 0:
            raise IndexError(f"step must be ≥ 0, got {step}")
        n = len(self.data.train)
        position = torch.arange(self.batch_size, device="cpu")[self.rows] + step * self.batch_size
        epochs = torch.div(position, n, rounding_mode="floor")
        return torch.cat([self._epoch(int(e))[position[epochs == e] % n] for e in epochs.unique()])

    def __getitem__(self, step: int) -> Tensor:
        """float32 (rows, *event_shape) on ``device``."""
        x = self.data.decode(self.data.train[self.indices(step)])
        if self.flip:
            chances = (self.batch_size, 1)
            u = ops.uniform(chances, self._flip_key.tensor("cpu"), step=step)[self.rows]
            x = torch.where(u.view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)
        if self.device.type == "cuda":
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)


# A batch, and on a GPU what is done once it has been copied there.
_Made = tuple[Tensor, torch.cuda.Event | None]


class Prefetch:
    """Makes the next batches in a thread of its own while the device works on the last, on the
    stream that is the current one where they are asked for.

    Args:
        batches: gives batch number ``step``.
        ahead: how many batches are made in advance.
    """

    def __init__(self, batches: Batches, ahead: int = 2) -> None:
        self.batches = batches
        self.ahead = check_count("ahead", ahead, 1)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="coopflow-batches")
        self._pending: dict[int, Future[_Made]] = {}

    def _future(self, step: int) -> Future[_Made]:
        if step not in self._pending:
            device = self.batches.device
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            self._pending[step] = self._pool.submit(self._make, step, stream)
        return self._pending[step]

    def _make(self, step: int, stream: torch.cuda.Stream | None) -> _Made:
        # A thread has streams of its own, and would hand over what is still being copied.
        with torch.cuda.stream(stream):
            batch = self.batches[step]
            return batch, None if stream is None else stream.record_event()

    def __getitem__(self, step: int) -> Tensor:
        """The same as ``batches[step]``; an error in the thread is raised here, once."""
        wanted = range(step, step + self.ahead + 1)
        futures = {s: self._future(s) for s in wanted}
        self._pending = futures  # what was made for other steps is not asked for any more
        asked = futures[step]
        if asked.exception() is not None:
            del self._pending[step]
        batch, copied = asked.result()
        if copied is not None:  # maybe on another stream, that was the current one then
            stream = torch.cuda.current_stream(batch.device)
            stream.wait_event(copied)
            batch.record_stream(stream)
        return batch
