"""Work on a CUDA device recorded once as graphs, and replayed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from coopflow_ext._model_state import ModelState
from coopflow_ext.autocast import float32_precision, uncached_casts
from coopflow_ext.errors import reason

_T = TypeVar("_T")
_Work = Callable[[], object]

_WARM_UPS = 2  # libraries choose algorithms and allocate workspaces before the capture

# What makes a cut in the graph that this thread captures.
_cut: ContextVar[Callable[[_Work], None] | None] = ContextVar("coopflow_cut", default=None)
# The debug mode of synchronisation is the process's, and so is much of what a capture touches.
_CAPTURING = threading.RLock()
# The allocator may keep a pointer to a graph whose capture failed.
_FAILED: list[torch.cuda.CUDAGraph] = []


class CaptureError(RuntimeError):
    """The work runs, but cannot be captured in a CUDA graph."""


def is_capturing(x: Tensor) -> bool:
    """Whether what is done on x's stream is only recorded, by a graph of the caller's."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_watched() -> bool:
    """Whether a dispatch mode (a counter of operations, fake tensors) or a transform of torch.func
    is on here, to which a replay would show nothing of what it does."""
    modes: int = torch._C._len_torch_dispatch_stack()
    return modes > 0 or bool(torch._C._functorch.maybe_current_level())


def between_graphs(work: _Work) -> None:
    """Do ``work``, which a graph cannot hold, such as waiting for other processes.

    Where this thread records for :class:`Recording`, that is not done now, but at each replay, in
    the middle of two graphs: of what came before, and of what comes after.
    """
    cut = _cut.get()
    work() if cut is None else cut(work)


@contextmanager
def cutting(cut: Callable[[_Work], None]) -> Iterator[None]:
    """Inside, ``cut`` is what :func:`between_graphs` leaves its work to."""
    token = _cut.set(cut)
    try:
        yield
    finally:
        _cut.reset(token)


class GraphOption:
    """What ``cuda_graph=True`` and ``"auto"`` do where a capture turns out to be impossible.

    Args:
        what: is captured, for the message.
        required: raise; otherwise warn once, and capture nothing from then on.

    Attributes:
        refused: whether that has happened.
    """

    def __init__(self, what: str, *, required: bool) -> None:
        self._what, self._required = what, required
        self.refused = False

    def attempt(self, capture: Callable[[], _T], *, stacklevel: int) -> _T | None:
        """What ``capture`` returns; None where there is no graph to be had.

        Args:
            stacklevel: of the warning, counted from this method, so that it names the user's line.

        Raises:
            RuntimeError: it is impossible and required; says why.
        """
        if self.refused:
            return None
        try:
            return capture()
        except CaptureError as error:
            message = f"{self._what} cannot be captured in a CUDA graph: {error}"
            if self._required:
                raise RuntimeError(f"cuda_graph=True: {message}") from error
            self.refused = True
            warnings.warn(f"cuda_graph='auto': {message}; it runs without", stacklevel=stacklevel)
            return None


class Recording:
    """Pieces of work on the same memory, each recorded as a CUDA graph, or as several and what is
    done :func:`between_graphs`, to be done again one at a time. They share the memory of what they
    allocate, none of which they leave to each other.

    Args:
        device: where they run; "cuda" is the current one.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._parts: dict[Hashable, list[_Work]] = {}
        self._pool: Any = None
        self._done = torch.cuda.Event()

    def __contains__(self, name: Hashable) -> bool:
        return name in self._parts

    def add(self, name: Hashable, run: _Work, *, warm_up: _Work) -> None:
        """Record what ``run`` does on the device.

        Args:
            name: by which it is replayed.
            run: the work, which allocates what it likes, and reads and writes what stays in place.
            warm_up: the same or a shorter part of it, called three times before the capture, the
                last time where waiting for the device raises: most of what cannot be captured is
                found there, and a capture that fails leaves torch with much to mend.

        Raises:
            CaptureError: the work cannot be captured, and why; streams, generators and the
                allocator are as they were. What ``warm_up`` and ``run`` changed is the caller's to
                restore.
        """
        with _CAPTURING, torch.cuda.device(self._device):
            self.wait()
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            # Around torch.cuda.graph too, which leaves its stream the current one when it fails.
            try:
                # The caller's autocast keeps casts of weights to its end; a graph is there longer.
                with torch.cuda.stream(stream), uncached_casts(self._device.type):
                    for _ in range(_WARM_UPS):
                        warm_up()
                    self._parts[name] = self._capture(run, warm_up, stream)
            finally:
                current.wait_stream(stream)
            self._done.record(current)

    def add_passes(
        self, name: Hashable, run: _Work, *, warm_up: _Work, module: nn.Module | None, what: str
    ) -> None:
        """:meth:`add` of passes of a module (None: of a plain callable), whose buffers, and torch's
        generators, are as they were afterwards.

        Args:
            what: the module is, for the message.

        Raises:
            CaptureError: also where a pass puts a tensor of the module's into other memory.
        """
        before = ModelState(module, self._device)
        try:
            self.add(name, run, warm_up=warm_up)
            moved = before.moved()
        finally:
            before.restore()
        if moved:
            self.forget(name)
            shown = ", ".join(moved[:3]) + (", …" if len(moved) > 3 else "")
            raise CaptureError(
                f"each pass of {what} puts {shown} into other memory, where a replay would not "
                "find it; change it in place"
            )

    def _capture(self, run: _Work, warm_up: _Work, stream: torch.cuda.Stream) -> list[_Work]:
        try:
            with _no_synchronisation():
                warm_up()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            return _Capture(self._device, self._pool, stream).parts_of(run)
        except Exception as error:
            raise CaptureError(reason(_root_cause(error))) from error

    def forget(self, name: Hashable) -> None:
        """Drop a recorded piece; waits for it on the host."""
        self.finish()
        del self._parts[name]

    def wait(self) -> None:
        """The memory belongs to one call at a time, whatever stream the calls are made on."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def replay(self, name: Hashable) -> None:
        with torch.cuda.device(self._device):
            for part in self._parts[name]:
                part()

    def release(self) -> None:
        """What the replays left behind was copied: the next call may start."""
        self._done.record(torch.cuda.current_stream(self._device))

    def finish(self) -> None:
        """Wait on the host until the memory is not in use."""
        self._done.synchronize()


class _Capture:
    """One capture of some work, made anew where the work is cut.

    Args:
        device: where it runs.
        pool: of the memory that the graphs share; what one has made and the next one uses is not
            given to others, as the tensors are there while the next one is captured.
        stream: that the work is captured on.
    """

    def __init__(self, device: torch.device, pool: Any, stream: torch.cuda.Stream) -> None:
        self._device, self._pool, self._stream = device, pool, stream
        self._parts: list[_Work] = []
        self._open = ExitStack()  # the capture of the moment

    def parts_of(self, run: _Work) -> list[_Work]:
        """What does the same again, one after the other: replays, and what is done between them."""
        raised: Exception | None = None
        try:
            with self._open, cutting(self._cut):
                self._begin()
                try:
                    run()
                except Exception as error:
                    raised = error
                    raise
        except Exception as error:
            # Where the work alone raised, the capture was ended as it should.
            if error is not raised:
                _mend_after_failed_capture(self._device, self._pool)
                _FAILED.append(self._graph)
            raise
        return self._parts

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(
            self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        self._open.enter_context(capture)
        self._parts.append(self._graph.replay)

    def _cut(self, work: _Work) -> None:
        self._open.close()
        self._parts.append(work)
        self._begin()


def kind_of_module(module: nn.Module | None) -> Hashable:
    """What a capture of a module depends on: which modules it has, their modes and hooks, the
    numbers and flags that those of this package hold, the precision that it runs in, and where its
    weights are, so that changes in place need no new capture.

    Where that is not all of a module of this package, a method ``capture_kind`` has the rest: where
    memory is that it keeps beside its state, or what its host decides by.
    """
    modules: list[Any] = []
    hooks: list[int] = list(chain(*_GLOBAL_HOOKS))
    weights: list[Hashable] = []
    for m in () if module is None else module.modules():  # once: it is asked at each call
        kind: Any = type(m)
        modules += id(m), kind, m.training
        hooks.extend(hooks_of(m))
        for w in (*m._parameters.values(), *m._buffers.values()):
            if w is not None:
                weights.append((w.data_ptr(), w.dtype, w.shape, w.stride()))
        if _is_ours(kind):
            modules += [value for value in vars(m).values() if type(value) in _PLAIN]
            if own := getattr(kind, "capture_kind", None):
                modules.append(own(m))
    return (
        tuple(modules),
        tuple(hooks),
        tuple(weights),
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
        float32_precision(),
        (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
    )


_PLAIN = {bool, int, float, str}
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(
    getattr(torch_module, f"_global_{name}_hooks")
    for name in ("forward", "forward_pre", "backward", "backward_pre")
)


@lru_cache(1024)  # classes that are made anew in every call may be many
def _is_ours(kind: Any) -> bool:
    return any(each.__module__.startswith("coopflow_ext.") for each in kind.__mro__)


def hooks_of(module: nn.Module) -> Iterator[int]:
    """Their numbers, of which torch gives each out once."""
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if hooks := getattr(module, name):
            yield from hooks


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """A RuntimeError at the end where the host waited for the device inside, unless the caller
    already has torch warn of that or raise.

    torch's mode is the process's: other threads may wait, and hear nothing of it.
    """
    if torch.cuda.get_sync_debug_mode() != 0:
        yield
        return
    thread, waited = threading.get_ident(), []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Any, category: Any, filename: str, line: int, *others: Any) -> None:
            if _WAITS not in str(message):
                show(message, category, filename, line, *others)
            elif threading.get_ident() == thread:
                waited.append(f"{message} at {filename}:{line}")

        warnings.showwarning = note  # type: ignore[assignment]
        warnings.filterwarnings("always", message=_WAITS)
        # That the mode is a prototype is not the user's matter.
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if waited:
        raise RuntimeError(waited[0])


_WAITS = "called a synchronizing CUDA operation"


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


def _root_cause(error: BaseException) -> BaseException:
    """The first failure: ending a broken capture raises another one on top of it."""
    while error.__context__ is not None:
        error = error.__context__
    return error
