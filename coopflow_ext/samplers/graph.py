"""Whole chains as CUDA graphs: captured once for each kind of call, then replayed."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from coopflow_ext.samplers.chain import Chain, Inputs, Plan
from coopflow_ext.samplers.gradient import frozen

_MAX_GRAPHS = 4  # each holds its own buffers and activations
_WARM_UP_STEPS = 3  # libraries choose algorithms and allocate workspaces before the capture


class _CaptureError(RuntimeError):
    """The chain runs, but cannot be captured."""


class _CapturedChain:
    """A chain on static buffers and the graph of its run."""

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        device = inputs.xs[0].device
        self.chain = Chain(plan, inputs)
        self.graph = torch.cuda.CUDAGraph()
        self.done = torch.cuda.Event()
        current = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self.chain.run(_WARM_UP_STEPS)
        stream.synchronize()
        try:
            with torch.cuda.graph(self.graph, stream=stream):
                self.chain.run()
        except Exception as error:
            raise _CaptureError(_root_cause(error)) from error
        current.wait_stream(stream)
        self.done.record(current)

    def replay(self, inputs: Inputs) -> None:
        """One chain from ``inputs``. The buffers belong to one call at a time, whatever stream the
        calls are made on."""
        current = torch.cuda.current_stream(inputs.xs[0].device)
        current.wait_event(self.done)
        self.chain.load(inputs)
        self.graph.replay()

    def release(self) -> None:
        """The results of the last replay were copied: the next may start."""
        self.done.record(torch.cuda.current_stream(self.chain.xs[0].device))


class ChainGraphs:
    """The captured chains of one sampler, the least recently used dropped first.

    Args:
        required: raise where a capture is impossible; otherwise warn once and run without.
    """

    def __init__(self, *, required: bool) -> None:
        self._required = required
        self._captured: OrderedDict[Hashable, _CapturedChain] = OrderedDict()
        self._refused = False

    def run(self, plan: Plan, inputs: Inputs) -> _CapturedChain | None:
        """Replay (after a capture, where none fits) from ``inputs``; None: run without a graph.

        Raises:
            RuntimeError: the capture is impossible and required; says why.
        """
        if self._refused:
            return None
        module = plan.gradient.module
        with torch.cuda.device(inputs.xs[0].device):
            try:
                kind = _kind(inputs, module)
                captured = self._captured.get(kind)
                if captured is None:
                    with frozen(module):
                        captured = _CapturedChain(plan, inputs.clone())
                    self._captured[kind] = captured
                    if len(self._captured) > _MAX_GRAPHS:
                        _, dropped = self._captured.popitem(last=False)
                        dropped.done.synchronize()
            except _CaptureError as error:
                message = f"the chain cannot be captured in a CUDA graph: {error}"
                if self._required:
                    raise RuntimeError(f"cuda_graph=True: {message}") from error
                self._refused = True
                warnings.warn(f"cuda_graph='auto': {message}; it runs without", stacklevel=3)
                return None
            self._captured.move_to_end(kind)
            captured.replay(inputs)
        return captured


def _kind(inputs: Inputs, module: nn.Module | None) -> Hashable:
    """What a captured chain depends on. Parameters count by their place in memory, so that
    changes in place need no new capture."""
    model = [] if module is None else list(module.modules())
    weights = [] if module is None else [*module.parameters(), *module.buffers()]
    constants = {k: v for k, v in inputs.model_kwargs.items() if not isinstance(v, Tensor)}
    kind = (
        type(inputs.like),
        tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs.tensors()),
        (inputs.x_refs is None, inputs.xis is None, inputs.chain_offset),
        (tuple(inputs.model_kwargs), tuple(constants.items())),
        tuple(m.training for m in model),
        tuple((w.data_ptr(), w.dtype, w.shape) for w in weights),
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
    )
    try:
        hash(kind)
    except TypeError as error:
        raise _CaptureError(f"model_kwargs must be tensors or hashable ({error})") from error
    return kind


def _root_cause(error: BaseException) -> str:
    """The first failure: ending a broken capture raises another one on top of it."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
