"""Whole chains as CUDA graphs: captured once for each kind of call, then replayed."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import nn

from coopflow_ext.samplers.chain import Chain, Inputs, Plan
from coopflow_ext.samplers.gradient import frozen
from coopflow_ext.samplers.nested import structure_of

_MAX_GRAPHS = 4  # each holds its own buffers and activations
_WARM_UP_STEPS = 3  # libraries choose algorithms and allocate workspaces before the capture


class _CaptureError(RuntimeError):
    """The chain runs, but cannot be captured."""


class _Recording:
    """A function's work on the device, to be done again."""

    def __init__(self, chain: Chain) -> None:
        self._device = chain.xs[0].device
        self._graph = torch.cuda.CUDAGraph()
        self._done = torch.cuda.Event()
        with torch.cuda.device(self._device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                chain.run(_WARM_UP_STEPS)
            stream.synchronize()
            try:
                with torch.cuda.graph(self._graph, stream=stream):
                    chain.run()
            except Exception as error:
                raise _CaptureError(_root_cause(error)) from error
            current.wait_stream(stream)
            self._done.record(current)

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


class CapturedChain:
    """A chain on static buffers and the recording of its run."""

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self.chain = Chain(plan, inputs.clone())
        self.recording = _Recording(self.chain)

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

    def run(self, plan: Plan, inputs: Inputs) -> CapturedChain | None:
        """Replay (after a capture, where none fits) from ``inputs``; None: run without a graph.

        Raises:
            RuntimeError: the capture is impossible and required; says why.
        """
        if self._refused:
            return None
        try:
            captured = self._find(plan, inputs)
        except _CaptureError as error:
            message = f"the chain cannot be captured in a CUDA graph: {error}"
            if self._required:
                raise RuntimeError(f"cuda_graph=True: {message}") from error
            self._refused = True
            warnings.warn(f"cuda_graph='auto': {message}; it runs without", stacklevel=4)
            return None
        captured.run(inputs)
        return captured

    def _find(self, plan: Plan, inputs: Inputs) -> CapturedChain:
        module = plan.gradient.module
        kind = _kind(inputs, module)
        captured = self._captured.get(kind)
        if captured is None:
            with frozen(module):
                captured = self._captured[kind] = CapturedChain(plan, inputs)
            if len(self._captured) > _MAX_GRAPHS:
                _, dropped = self._captured.popitem(last=False)
                dropped.recording.finish()
        self._captured.move_to_end(kind)
        return captured


def _kind(inputs: Inputs, module: nn.Module | None) -> Hashable:
    """What a captured chain depends on. Parameters count by their place in memory, so that
    changes in place need no new capture."""
    model = [] if module is None else list(module.modules())
    weights = [] if module is None else [*module.parameters(), *module.buffers()]
    kind = (
        type(inputs.like),
        tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs.tensors()),
        (inputs.x_refs is None, inputs.xis is None, inputs.chain_offset),
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


def _root_cause(error: BaseException) -> str:
    """The first failure: ending a broken capture raises another one on top of it."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
