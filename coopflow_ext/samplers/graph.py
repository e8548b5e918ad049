"""Whole chains as CUDA graphs: captured once for each kind of call, then replayed."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from coopflow_ext.samplers.chain import Chain, Inputs, Plan
from coopflow_ext.samplers.gradient import reason
from coopflow_ext.samplers.model_state import ModelState
from coopflow_ext.samplers.nested import structure_of

_MAX_GRAPHS = 4  # each holds its own buffers and activations
_WARM_UP_STEPS = 2  # libraries choose algorithms and allocate workspaces before the capture

# The debug mode of synchronisation is the process's, and so is much of what a capture touches.
_CAPTURING = threading.RLock()


class _CaptureError(RuntimeError):
    """The chain runs, but cannot be captured."""


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """torch raises inside where the host would wait for the device, unless the caller already has
    it warn or raise."""
    if torch.cuda.get_sync_debug_mode() != 0:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Recording:
    """A chain's work on the device, to be done again.

    Raises:
        _CaptureError: the work cannot be captured; torch is as it was before.
    """

    def __init__(self, chain: Chain) -> None:
        self._device = chain.xs[0].device
        self._graph = torch.cuda.CUDAGraph()
        self._done = torch.cuda.Event()
        with torch.cuda.device(self._device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            # Around torch.cuda.graph too, which leaves its stream the current one when it fails.
            try:
                with torch.cuda.stream(stream):
                    chain.run(_WARM_UP_STEPS)
                    self._capture(chain, stream)
            finally:
                current.wait_stream(stream)
            self._done.record(current)

    def _capture(self, chain: Chain, stream: torch.cuda.Stream) -> None:
        try:
            # Most of what cannot be captured is found before anything is: a capture that fails
            # leaves torch with much to mend.
            with _no_synchronisation():
                chain.run(1)
            stream.synchronize()
            self._record(chain, stream)
        except Exception as error:
            raise _CaptureError(reason(_root_cause(error))) from error

    def _record(self, chain: Chain, stream: torch.cuda.Stream) -> None:
        pool = torch.cuda.graph_pool_handle()
        capture = torch.cuda.graph(
            self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        try:
            with capture:
                chain.run()
        except Exception:
            _mend_after_failed_capture(self._device, pool)
            _FAILED.append(self._graph)
            raise

    def wait(self) -> None:
        """The buffers belong to one call at a time, whatever stream the calls are made on."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()

    def release(self) -> None:
        """What the replay left in the buffers was copied: the next call may start."""
        self._done.record(torch.cuda.current_stream(self._device))

    def finish(self) -> None:
        """Wait on the host until the buffers are not in use."""
        self._done.synchronize()


# The allocator may keep a pointer to a graph whose capture failed.
_FAILED: list[torch.cuda.CUDAGraph] = []


def _mend_after_failed_capture(device: torch.device, pool: Any) -> None:
    """What ``CUDAGraph.capture_end`` leaves undone when it raises (seen with torch 2.11): the
    generator still counts its offsets for the capture and refuses every draw outside of it, and the
    allocator still sends what is allocated to the graph's pool, which it then never frees."""
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())
    memory: Any = torch.cuda.memory
    for end in (memory._cuda_endAllocateToPool, memory._cuda_releasePool):
        with suppress(RuntimeError):  # where the failing capture_end came so far
            end(device.index, pool)


class CapturedChain:
    """A chain on static buffers and the recording of its run."""

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self.chain = Chain(plan, inputs.clone())
        # Of the module that computes, which may be a twin of the caller's with the same tensors.
        before = ModelState(self.chain.gradient.module, inputs.xs[0].device)
        try:
            self.recording = _Recording(self.chain)
            moved = before.moved()
        finally:
            before.restore()
        if moved:
            shown = ", ".join(moved[:3]) + (", …" if len(moved) > 3 else "")
            raise _CaptureError(
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
                with _CAPTURING:
                    self._captured[kind] = CapturedChain(plan, inputs)
        except _CaptureError as error:
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
        raise _CaptureError(
            f"model_kwargs must be tensors or hashable, alone or in dicts, lists, tuples ({error})"
        ) from error
    return kind


def _root_cause(error: BaseException) -> BaseException:
    """The first failure: ending a broken capture raises another one on top of it."""
    while error.__context__ is not None:
        error = error.__context__
    return error
