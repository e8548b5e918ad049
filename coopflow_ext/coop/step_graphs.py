"""Steps of a training as CUDA graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from coopflow_ext._recording import GraphOption, Recording
from coopflow_ext.recorded_key import Derivation, Streams, derived
from coopflow_ext.rng import Key

_EAGER = 3  # steps of a kind before its capture: they allocate, compile, and choose algorithms


class HasKey(Protocol):
    """What draws from a key of its own."""

    key: Key


class _Captured(NamedTuple):
    """What a replay of a kind of step leaves behind.

    Attributes:
        metrics: its results, in memory that the next replay of any kind overwrites.
        derivations: how each key has moved on.
    """

    metrics: dict[str, Tensor]
    derivations: list[Derivation]


class StepGraphs:
    """Runs steps: the first few of each kind one operator after the other, then as one CUDA graph,
    or as several where processes exchange something in between.

    Args:
        step: (kind, batch) → results by name, 0-d tensors. What varies from step to step within a
            kind must come from the batch, from the keys, or from tensors changed in place.
        keyed: everything whose ``key`` a step draws from.
        depends_on: what else a step depends on, to be compared: where memory is, modes, flags. What
            was captured before it changed is dropped.
        device: where it runs.
        required: raise where a kind cannot be captured; otherwise warn once and run without.
    """

    def __init__(
        self,
        step: Callable[[Any, Tensor], dict[str, Tensor]],
        keyed: Sequence[HasKey],
        device: torch.device,
        *,
        required: bool,
        depends_on: Callable[[], object] = lambda: None,
    ) -> None:
        self._step, self._keyed = step, keyed
        self._depends_on, self._dependence = depends_on, depends_on()
        self._option = GraphOption("a step of the training", required=required)
        self._streams = [Streams() for _ in keyed]
        self._device = device
        self._recording = Recording(device)
        self._seen: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _Captured] = {}
        self._batch: Tensor | None = None

    def run(self, kind: Hashable, batch: Tensor) -> dict[str, Tensor]:
        """One step.

        Raises:
            RuntimeError: the kind cannot be captured and must be; says why.
        """
        if self._option.refused:
            return self._step(kind, batch)
        if (dependence := self._depends_on()) != self._dependence:
            self._release()
            self._seen.clear()
            self._dependence = dependence
        if self._batch is None:
            self._batch = batch.clone()
        self._batch.copy_(batch)
        if self._seen[kind] < _EAGER:
            # With keys as in the capture, before which their streams have to be there; and so that
            # the models capture none of their own calls.
            with self._recorded_keys():
                metrics = self._step(kind, self._batch)
            self._seen[kind] += 1  # not of a step that was broken off: it may not have allocated
            self._dependence = self._depends_on()  # what the step itself made was not there before
            return metrics
        if kind not in self._captured:
            captured = self._option.attempt(partial(self._capture, kind, self._batch), stacklevel=4)
            if captured is None:
                self._release()  # those of other kinds too
                return self._step(kind, batch)
            self._captured[kind] = captured
        return self._replay(kind)

    def _release(self) -> None:
        """The graphs, which will not be replayed, and their memory."""
        self._recording.finish()
        self._captured.clear()
        self._recording = Recording(self._device)

    def _capture(self, kind: Hashable, batch: Tensor) -> _Captured:
        metrics: dict[str, Tensor] = {}
        before = [owner.key for owner in self._keyed]
        try:
            with self._recorded_keys(closed=True) as derivations:
                self._recording.add(
                    kind, lambda: metrics.update(self._step(kind, batch)), warm_up=lambda: None
                )
        finally:
            for owner, key in zip(self._keyed, before, strict=True):  # no step was made
                owner.key = key
        return _Captured(metrics, derivations)

    def _replay(self, kind: Hashable) -> dict[str, Tensor]:
        captured = self._captured[kind]
        for owner, streams in zip(self._keyed, self._streams, strict=True):
            streams.fill(owner.key)
        self._recording.replay(kind)
        for owner, derivation in zip(self._keyed, captured.derivations, strict=True):
            owner.key = derived(owner.key, derivation)
        return {name: value.clone() for name, value in captured.metrics.items()}

    @contextmanager
    def _recorded_keys(self, *, closed: bool = False) -> Iterator[list[Derivation]]:
        """Inside, what is drawn comes from tensors that stay; ``closed``: from those that there
        are. Afterwards the list says how each key has moved on."""
        derivations: list[Derivation] = []
        for owner, streams in zip(self._keyed, self._streams, strict=True):
            owner.key, streams.closed = streams.record(owner.key), closed
        try:
            yield derivations
        finally:
            for owner, streams in zip(self._keyed, self._streams, strict=True):
                streams.closed = False
                derivations.append(getattr(owner.key, "derivation", ()))
                owner.key = Key(owner.key.seed, owner.key.time, owner.key.chain)
