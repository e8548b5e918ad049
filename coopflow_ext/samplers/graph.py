"""Whole chains as replays of CUDA graphs of a few steps, recorded once for each kind of call.

The next steps of a chain are the first steps of another that starts where it stands, at the key's
later time. So a few recorded steps serve every one of T: before each replay its rows of the
coefficients, of supplied normals and of step_kwargs are copied to where the recorded steps read
theirs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from coopflow_ext._recording import (
    CaptureError,
    GraphOption,
    Recording,
    is_capturing,
    is_watched,
    kind_of_module,
)
from coopflow_ext._tensors import Coefficient
from coopflow_ext.samplers.chain import Chain, Inputs, Plan
from coopflow_ext.samplers.nested import structure_of
from coopflow_ext.samplers.output import ChainStatistics, Tensors
from coopflow_ext.samplers.schedule import columns, is_off, place

_LENGTHS = (16, 4, 1)  # steps of a recorded piece; the longest that fits comes next
_MAX_CHAINS = 4  # each holds its own buffers and activations
_START = "start"


class _Piece(NamedTuple):
    """So many steps, after which the chain goes on or ends."""

    n_steps: int
    ends: bool


def pieces(n_steps: int, *, marks_end: bool) -> Iterator[tuple[int, _Piece]]:
    """The pieces of T steps, each with the number of its first step.

    Args:
        n_steps: T.
        marks_end: whether the last step is another than the ones before.
    """
    start = 0
    while start < n_steps:
        length = next(length for length in _LENGTHS if length <= n_steps - start)
        yield start, _Piece(length, marks_end and start + length == n_steps)
        start += length


def _run_piece(chain: Chain, piece: _Piece) -> None:
    """Its steps, after which the clocks stand at the next piece's first."""
    chain.run(piece.n_steps, ends=piece.ends)
    later, earlier = [rng[1:2] for rng in chain.rngs], []
    if chain.frozen_at is not None:
        earlier.append(chain.frozen_at)  # counted from the first step of a piece
    by = [piece.n_steps] * len(later) + [-piece.n_steps] * len(earlier)
    torch._foreach_add_(later + earlier, by)


class CapturedChain:
    """A chain on static buffers, recorded in pieces of a few steps of which any number is made.

    Args:
        plan: the sampler's; its number of steps and the values of its coefficients do not matter.
        inputs: of a call like those to come.
    """

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        longest = max(_LENGTHS)
        # What is off stays off, since a step then does without it.
        self._windows = {
            name: _window(value, longest, inputs.xs)
            for name, value in plan.coefficients.items()
            if not is_off(value)
        }
        coefficients = {**plan.coefficients, **self._windows}
        window = replace(plan, n_steps=longest, thin=1, keep_start=False, coefficients=coefficients)
        self.chain = window.chain(inputs.window(longest))
        self._recording = Recording(inputs.xs[0].device)
        self._record(_START, self.chain.begin, warm_up=self.chain.begin)
        self._tables: dict[str, Tensor] = {}
        self._loaded: Mapping[str, Coefficient] | None = None

    def prepare(self, plan: Plan) -> None:
        """Record what a run needs and none before it did.

        Raises:
            CaptureError: it cannot be captured.
        """
        for _, piece in pieces(plan.n_steps, marks_end=plan.end_clamp is not None):
            if piece not in self._recording:
                warm_up = partial(_run_piece, self.chain, _Piece(1, piece.ends))
                self._record(piece, partial(_run_piece, self.chain, piece), warm_up=warm_up)

    def _record(self, name: Hashable, run: Any, *, warm_up: Any) -> None:
        # Of the module that computes, which may be a twin of the caller's with the same tensors.
        module = self.chain.gradient.module
        self._recording.add_passes(name, run, warm_up=warm_up, module=module, what="the energy")

    def run(self, plan: Plan, inputs: Inputs) -> Replayed:
        """All the steps from ``inputs``, by replays; its tensors are the buffers' until
        :meth:`release`."""
        self._recording.wait()
        for mine, given in zip(self.chain.inputs.constants(), inputs.constants(), strict=True):
            mine.copy_(given)
        self._load(plan.coefficients)
        result = Replayed(plan, self.chain)
        self._recording.replay(_START)
        for start, piece in pieces(plan.n_steps, marks_end=plan.end_clamp is not None):
            steps = slice(start, start + piece.n_steps)
            for name, table in self._tables.items():
                self._windows[name][: piece.n_steps].copy_(table[steps])
            for mine, given in zip(self.chain.inputs.rows(), inputs.rows(), strict=True):
                mine[: piece.n_steps].copy_(given[steps])
            self._recording.replay(piece)
            result.records.take(self.chain.records, start, piece.n_steps)
        return result

    def _load(self, coefficients: Mapping[str, Coefficient]) -> None:
        """Constants go into all rows of their windows, tables to the device."""
        if coefficients is self._loaded:
            return
        self._tables = {}
        for name, window in self._windows.items():
            value = place(name, coefficients[name], *self.chain.xs)
            if not isinstance(value, Tensor):
                window.fill_(value)
            elif len(value) == 1:
                window.copy_(value)
            else:
                self._tables[name] = value
        self._loaded = coefficients

    def release(self) -> None:
        """The results are copied: the next run may start."""
        self._recording.release()

    def finish(self) -> None:
        """Wait until the buffers are not in use."""
        self._recording.finish()


def _window(value: Coefficient, n_steps: int, xs: Tensors) -> Tensor:
    """Rows of a coefficient for the steps of a piece."""
    zeros = torch.zeros(n_steps, columns(value), dtype=torch.float64, device="cpu")
    rows = place("window", zeros, *xs)
    assert isinstance(rows, Tensor)
    return rows


def can_capture(x: Tensor, *, required: bool) -> bool:
    """Whether chains from x may be captured; ValueError where they must and x is on no GPU."""
    if required and not x.is_cuda:
        raise ValueError(f"cuda_graph=True needs x0 on a CUDA device, got {x.device}")
    return x.is_cuda and x.numel() > 0 and not is_capturing(x) and not is_watched()


class Replayed:
    """What :class:`Chain` is for steps one by one, after a chain of replays.

    Attributes:
        chain: whose buffers hold what the last step left.
        last: the state after the last step, in the chain's buffers.
        active: (B,), whether a chain has not stopped, or None.
        records: copies of what the steps left behind.
    """

    def __init__(self, plan: Plan, chain: Chain) -> None:
        self._n_steps, self.chain = plan.n_steps, chain
        self.last, self.active = chain.last, chain.active
        self.records = plan.records(chain.xs)

    def stopped(self) -> bool:
        """Whether a chain has met a gradient that is not finite: one read."""
        return self.chain.stopped()

    @property
    def frozen_at(self) -> Tensor | None:
        """(B,), the step at which a chain stopped, T where it did not."""
        if self.active is None or self.chain.frozen_at is None:
            return None
        since_end = self.chain.frozen_at
        return torch.where(self.active, self._n_steps, self._n_steps + since_end)

    def statistics(self) -> ChainStatistics | None:
        """The recorded sums as norms and fractions over the whole state."""
        return self.records.statistics(self.chain.plan.gradient.sign)


class ChainGraphs:
    """The captured chains of one sampler, the least recently used dropped first.

    Args:
        required: raise where a capture is impossible; otherwise warn once and run without.
    """

    def __init__(self, *, required: bool) -> None:
        self._required = required
        self._option = GraphOption("the chain", required=required)
        self._captured: OrderedDict[Hashable, CapturedChain] = OrderedDict()
        self._in_use = threading.Lock()

    def __reduce__(self) -> Any:
        """A copy captures its own."""
        return _new_graphs, (self._required,)

    @contextmanager
    def replayed(self, plan: Plan, inputs: Inputs) -> Iterator[Replayed | None]:
        """The chain that replays (after a capture, where none fits) have run from ``inputs``, its
        last state in its buffers until the end of the block; None: run without a graph.

        Raises:
            RuntimeError: the capture is impossible and required; says why.
        """
        with self._in_use:  # the buffers belong to one thread at a time
            captured = self._option.attempt(partial(self._find, plan, inputs), stacklevel=6)
            if captured is None:
                while self._captured:
                    self._drop_oldest()
                yield None
                return
            try:
                yield captured.run(plan, inputs)
            finally:
                captured.release()

    def _find(self, plan: Plan, inputs: Inputs) -> CapturedChain:
        kind = _kind(plan, inputs)
        captured = self._captured.pop(kind, None) or CapturedChain(plan, inputs)
        try:
            captured.prepare(plan)
        except CaptureError:  # what it has recorded so far is of no use, and may be wrong
            captured.finish()
            raise
        self._captured[kind] = captured  # the last one used
        while len(self._captured) > _MAX_CHAINS:
            self._drop_oldest()
        return captured

    def _drop_oldest(self) -> None:
        _, dropped = self._captured.popitem(last=False)
        dropped.finish()


def graphs_for(cuda_graph: bool | Literal["auto"]) -> ChainGraphs | None:
    """What a sampler's option ``cuda_graph`` asks for."""
    return None if cuda_graph is False else ChainGraphs(required=cuda_graph is True)


def _new_graphs(required: bool) -> ChainGraphs:
    return ChainGraphs(required=required)


def _kind(plan: Plan, inputs: Inputs) -> Hashable:
    """What a captured chain depends on; of coefficients, what their rows are like."""
    kind = (
        type(inputs.like),
        tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs.constants()),
        tuple((name, is_off(v), columns(v)) for name, v in plan.coefficients.items()),
        (inputs.x_refs is None, inputs.xis is None),
        structure_of(inputs.model_kwargs),
        tuple((name, v.shape[1:], v.dtype) for name, v in inputs.step_kwargs.items()),
        kind_of_module(plan.gradient.module),
    )
    try:
        hash(kind)
    except TypeError as error:
        raise CaptureError(
            f"model_kwargs must be tensors or hashable, alone or in dicts, lists, tuples ({error})"
        ) from error
    return kind
