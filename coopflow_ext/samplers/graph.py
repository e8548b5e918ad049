"""Whole chains as CUDA graphs: captured once for each kind of call, then replayed."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from coopflow_ext._recording import CaptureError, Recording
from coopflow_ext.samplers.chain import Chain, Inputs, Plan
from coopflow_ext.samplers.model_state import ModelState
from coopflow_ext.samplers.nested import structure_of

_MAX_GRAPHS = 4  # each holds its own buffers and activations


class CapturedChain:
    """A chain on static buffers and the recording of its run."""

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self.chain = Chain(plan, inputs.clone())
        # Of the module that computes, which may be a twin of the caller's with the same tensors.
        device = inputs.xs[0].device
        before = ModelState(self.chain.gradient.module, device)
        try:
            one_step = partial(self.chain.run, 1)
            self.recording = Recording(self.chain.run, warm_up=one_step, device=device)
            moved = before.moved()
        finally:
            before.restore()
        if moved:
            shown = ", ".join(moved[:3]) + (", …" if len(moved) > 3 else "")
            raise CaptureError(
                f"each pass of the energy puts {shown} into other memory, where a replay would not "
                "find it; change it in place"
            )

    def run(self, inputs: Inputs) -> None:
        """One chain from ``inputs``; its results stay in the buffers until :meth:`release`."""
        self.recording.wait()
        self.chain.load(inputs)
        self.recording.replay()

    def release(self) -> None:
        self.recording.release()


class ChainGraphs:
    """The captured chains of one sampler, the least recently used dropped first.

    Args:
        required: raise where a capture is impossible; otherwise warn once and run without.
    """

    def __init__(self, *, required: bool) -> None:
        self._required = required
        self._captured: OrderedDict[Hashable, CapturedChain] = OrderedDict()
        self._refused = False
        self._in_use = threading.Lock()

    def __reduce__(self) -> Any:
        """A copy captures its own."""
        return _new_graphs, (self._required,)

    @contextmanager
    def replayed(self, plan: Plan, inputs: Inputs) -> Iterator[Chain | None]:
        """The chain that a replay (after a capture, where none fits) has run from ``inputs``, its
        results in its buffers until the end of the block; None: run without a graph.

        Raises:
            RuntimeError: the capture is impossible and required; says why.
        """
        with self._in_use:  # the buffers belong to one thread at a time
            captured = None if self._refused else self._find(plan, inputs)
            if captured is None:
                yield None
                return
            captured.run(inputs)
            try:
                yield captured.chain
            finally:
                captured.release()

    def _find(self, plan: Plan, inputs: Inputs) -> CapturedChain | None:
        try:
            kind = _kind(inputs, plan.gradient.module)
            if kind not in self._captured:
                self._captured[kind] = CapturedChain(plan, inputs)
        except CaptureError as error:
            message = f"the chain cannot be captured in a CUDA graph: {error}"
            if self._required:
                raise RuntimeError(f"cuda_graph=True: {message}") from error
            self._refused = True
            warnings.warn(f"cuda_graph='auto': {message}; it runs without", stacklevel=6)
            return None
        self._captured.move_to_end(kind)
        if len(self._captured) > _MAX_GRAPHS:
            _, dropped = self._captured.popitem(last=False)
            dropped.recording.finish()
        return self._captured[kind]


def _new_graphs(required: bool) -> ChainGraphs:
    return ChainGraphs(required=required)


def _kind(inputs: Inputs, module: nn.Module | None) -> Hashable:
    """What a captured chain depends on. Parameters count by their place in memory, so that
    changes in place need no new capture."""
    model = [] if module is None else list(module.modules())
    weights = [] if module is None else [*module.parameters(), *module.buffers()]
    kind = (
        type(inputs.like),
        tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs.tensors()),
        (inputs.x_refs is None, inputs.xis is None),
        structure_of(inputs.model_kwargs),
        tuple(m.training for m in model),
        tuple((w.data_ptr(), w.dtype, w.shape) for w in weights),
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
    )
    try:
        hash(kind)
    except TypeError as error:
        raise CaptureError(
            f"model_kwargs must be tensors or hashable, alone or in dicts, lists, tuples ({error})"
        ) from error
    return kind
