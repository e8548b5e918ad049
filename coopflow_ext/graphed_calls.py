"""Calls of a module's functions as CUDA graphs, captured once for each kind of call."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coopflow_ext._recording import GraphOption, Recording, kind_of_module
from coopflow_ext.recorded_key import Streams
from coopflow_ext.rng import Key

_MAX_CALLS = 4  # each keeps a graph; their activations lie in the same memory
_MOST_KINDS = 64  # to remember

_Function = Callable[..., Tensor]


class _Captured(NamedTuple):
    """Memory of one kind of call."""

    streams: Streams
    tensors: tuple[Tensor, ...]
    results: list[Tensor]  # one


class GraphedCalls:
    """Functions of a key and tensors → a tensor that change nothing, replayed where possible.

    The first call of a kind runs operator by operator: what is called once is not worth a capture.

    Args:
        what: they are, for messages.
        required: raise where one cannot be captured; otherwise warn once and run without graphs.
    """

    def __init__(self, what: str, *, required: bool) -> None:
        self._what, self._required = what, required
        self._option = GraphOption(what, required=required)
        self._recording: Recording | None = None
        self._device: torch.device | None = None
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._called: deque[Hashable] = deque(maxlen=_MOST_KINDS)  # once so far
        self._in_use = threading.Lock()
        self._user: int | None = None  # the thread that has it

    def __reduce__(self) -> Any:
        """A copy captures its own."""
        return _new_calls, (self._what, self._required)

    def call(
        self, name: Hashable, function: _Function, module: nn.Module, key: Key, *tensors: Tensor
    ) -> Tensor:
        """What ``function(key, *tensors)`` returns.

        Args:
            name: what beside the tensors' shapes and the module decides which operators run.
            function: deterministic, given these; under no_grad.
            module: whose weights it reads; it has some.
            key: where it draws from.
            tensors: on one device.

        Raises:
            RuntimeError: it cannot be captured and must be; says why.
        """
        if self._option.refused:
            return function(key, *tensors)
        kind = (
            name,
            tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors),
            kind_of_module(module),
        )
        if self._user == threading.get_ident():  # a call inside of the one that is captured
            return function(key, *tensors)
        with self._in_use:  # the memory belongs to one thread at a time
            self._user = threading.get_ident()
            try:
                called = kind in self._called
                if called and kind not in self._captured:
                    captured = self._option.attempt(
                        partial(self._capture, kind, function, module, key, tensors), stacklevel=5
                    )
                    if captured is not None:
                        self._captured[kind] = captured
                if kind in self._captured:
                    return self._replay(kind, key, tensors)
                if not called:
                    self._called.append(kind)
            finally:
                self._user = None
        return function(key, *tensors)

    def _capture(
        self,
        kind: Hashable,
        function: _Function,
        module: nn.Module,
        key: Key,
        tensors: tuple[Tensor, ...],
    ) -> _Captured:
        device = next(module.parameters()).device
        if self._recording is None or self._device != device:
            if self._recording is not None:
                self._recording.finish()
            self._captured.clear()
            self._recording, self._device = Recording(device), device

        def run() -> None:
            captured.results[:] = [function(recorded, *captured.tensors)]

        with torch.inference_mode(False), torch.no_grad():  # what stays is of no mode
            captured = _Captured(Streams(), tuple(t.clone() for t in tensors), [])
            recorded = captured.streams.record(key)
            self._recording.add_passes(kind, run, warm_up=run, module=module, what="the module")
        while len(self._captured) >= _MAX_CALLS:
            oldest, _ = self._captured.popitem(last=False)
            self._recording.forget(oldest)
        return captured

    def _replay(self, kind: Hashable, key: Key, tensors: tuple[Tensor, ...]) -> Tensor:
        assert self._recording is not None
        captured = self._captured[kind]
        self._captured.move_to_end(kind)
        self._recording.wait()
        captured.streams.fill(key)
        for mine, given in zip(captured.tensors, tensors, strict=True):
            mine.copy_(given)
        self._recording.replay(kind)
        result = captured.results[0].clone()
        self._recording.release()
        return result


def _new_calls(what: str, required: bool) -> GraphedCalls:
    return GraphedCalls(what, required=required)
