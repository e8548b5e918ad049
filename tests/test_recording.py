"""A recording's steps, with a torch.cuda that notes what it is asked for; on a GPU, see
test_sampler_graph.py."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from coopflow_ext import _recording
from coopflow_ext.autocast import tensor_float32

WARM_UPS = ["warm-up 0", "warm-up 0", "warm-up 1"]


class FakeCuda:
    """Stands for torch.cuda in the recording itself, and notes what it is asked for."""

    def __init__(self, monkeypatch, *, fails: str = "", twice: bool = False, cut: bool = False):
        self.log: list[str] = []
        self.sync_mode, self.fails, self.twice, self.cut = 0, fails, twice, cut
        self.invalid = False
        self.pools = 0
        self.generator = SimpleNamespace(
            clone_state=lambda: "clone", graphsafe_set_state=lambda s: self.log.append(f"set {s}")
        )
        self.default_generators = [self.generator]
        self.memory = SimpleNamespace(
            _cuda_endAllocateToPool=lambda *a: self.log.append(f"end {a}"),
            _cuda_releasePool=lambda *a: self.log.append(f"release {a}"),
        )
        self.n_graphs = 0
        self.Event = lambda: SimpleNamespace(record=lambda stream: self.log.append("done"))
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_device = lambda: 0
        monkeypatch.setattr(_recording, "torch", SimpleNamespace(cuda=self, device=torch.device))

    def current_stream(self, device=None):
        return SimpleNamespace(
            wait_stream=lambda stream: self.log.append("joined"), wait_event=lambda event: None
        )

    def graph_pool_handle(self):
        self.pools += 1
        return "pool"

    def CUDAGraph(self):  # noqa: N802 (as torch has it)
        self.n_graphs += 1
        return SimpleNamespace(
            replay=lambda number=self.n_graphs: self.log.append(f"replay {number}")
        )

    def get_sync_debug_mode(self):
        return self.sync_mode

    def set_sync_debug_mode(self, mode):
        if mode != "default":  # torch says so the first time
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        self.sync_mode = {"default": 0, "warn": 1}[mode]

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def stream(self, stream):
        yield
        self.log.append("stream left")

    @contextmanager
    def graph(self, recorded, *, pool, stream, capture_error_mode):
        assert pool == "pool"
        self.log.append(f"capture {capture_error_mode}")
        try:
            yield
        finally:
            if self.invalid:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.log.append("captured")

    def record(self, device: str = "cuda:0") -> _recording.Recording:
        def work(name: str) -> None:
            self.log.append(f"{name} {self.sync_mode}")
            if self.fails == "sync" and self.sync_mode == 1:
                warnings.warn("called a synchronizing CUDA operation (by torch)", stacklevel=2)
            if self.cut and name == "run":
                _recording.between_graphs(lambda: self.log.append("between"))
                self.log.append("run on")
            if self.fails == "capture" and name == "run":
                self.invalid = True
                raise RuntimeError("operation not permitted\nwhen stream is capturing")
            if self.fails == "work" and name == "run":
                raise torch.OutOfMemoryError("out of memory")

        recording = _recording.Recording(torch.device(device))
        for name in ("first", "second")[: 1 + self.twice]:
            recording.add(name, lambda: work("run"), warm_up=lambda: work("warm-up"))
        return recording


@pytest.mark.filterwarnings("error")
def test_the_last_warm_up_step_finds_what_waits_for_the_device(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    cuda.record()
    steps = [*WARM_UPS, "capture thread_local", "run 0", "captured"]
    assert cuda.log == [*steps, "stream left", "joined", "done"]
    assert cuda.sync_mode == 0

    cuda = FakeCuda(monkeypatch, fails="sync")
    with pytest.raises(_recording.CaptureError, match="called a synchronizing CUDA operation"):
        cuda.record()
    assert cuda.log == [*WARM_UPS, "joined"]  # no capture was begun
    assert cuda.sync_mode == 0

    cuda = FakeCuda(monkeypatch)
    cuda.sync_mode = 2  # the caller's
    cuda.record()
    assert "warm-up 2" in cuda.log
    assert cuda.sync_mode == 2


@pytest.mark.filterwarnings("error")
def test_other_threads_may_wait_for_the_device_meanwhile(monkeypatch):
    """torch's mode is the process's: they hear nothing of it, and do not spoil the capture."""
    cuda, heard = FakeCuda(monkeypatch), []

    def waits() -> None:
        try:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        except Warning as warning:
            heard.append(warning)

    def work() -> None:
        if cuda.sync_mode == 1:
            other = threading.Thread(target=waits)
            other.start()
            other.join()

    recording = _recording.Recording(torch.device("cuda", 0))
    recording.add("first", work, warm_up=work)
    assert "first" in recording
    assert not heard
    with pytest.raises(UserWarning, match="called a synchronizing"):  # the filters are as they were
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_casts_of_weights_are_made_anew_in_the_callers_autocast(monkeypatch):
    """Those that its cache holds are gone when a graph that reads them is replayed."""
    FakeCuda(monkeypatch)
    caches = []
    recording = _recording.Recording(torch.device("cuda", 0))

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16):  # its own, which inherits the setting
            caches.append(torch.is_autocast_cache_enabled())

    torch.set_autocast_enabled("cuda", True)  # torch.autocast would not, without a GPU
    try:
        recording.add("inside", work, warm_up=work)
        assert torch.is_autocast_cache_enabled()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert caches == [False] * 4
    recording.add("outside", work, warm_up=work)
    assert caches[4:] == [True] * 4  # kept to the end of the work's own autocast


@pytest.mark.parametrize("device", ["cuda:0", "cuda"])
def test_a_capture_that_fails_is_mended(monkeypatch, device):
    cuda = FakeCuda(monkeypatch, fails="capture")
    with pytest.raises(_recording.CaptureError, match="not permitted when stream is capturing"):
        cuda.record(device)
    assert cuda.log[-4:] == ["set clone", "end (0, 'pool')", "release (0, 'pool')", "joined"]


def test_where_the_work_alone_fails_nothing_is_mended(monkeypatch):
    """The capture has ended as it should, and a pool released twice aborts the process."""
    cuda = FakeCuda(monkeypatch, fails="work")
    with pytest.raises(_recording.CaptureError, match="out of memory"):
        cuda.record()
    assert "captured" in cuda.log
    assert not any(line.startswith(("set", "end", "release")) for line in cuda.log)


def test_pieces_of_work_share_their_memory(monkeypatch):
    cuda = FakeCuda(monkeypatch, twice=True)
    recording = cuda.record()
    assert cuda.pools == 1
    assert "first" in recording
    assert "second" in recording
    assert "third" not in recording


def test_work_is_cut_where_no_graph_can_hold_it(monkeypatch):
    cuda = FakeCuda(monkeypatch, cut=True)
    recording = cuda.record()
    begin, end = "capture thread_local", "captured"
    assert cuda.log[3:-3] == [begin, "run 0", end, begin, "run on", end]
    cuda.log.clear()
    recording.replay("first")
    assert cuda.log == ["replay 1", "between", "replay 2"]

    cuda.log.clear()
    _recording.between_graphs(lambda: cuda.log.append("at once"))
    assert cuda.log == ["at once"]


def test_a_capture_that_fails_after_a_cut_is_mended_once(monkeypatch):
    cuda = FakeCuda(monkeypatch, cut=True, fails="capture")
    with pytest.raises(_recording.CaptureError, match="not permitted when stream is capturing"):
        cuda.record()
    assert cuda.log.count("captured") == 1
    assert cuda.log.count("set clone") == 1
    _recording.between_graphs(lambda: cuda.log.append("at once"))
    assert cuda.log[-1] == "at once"


class _Own(torch.nn.Linear):
    """As one of this package."""

    __module__ = "coopflow_ext.own"
    factor = 1.0
    memory = 0

    def capture_kind(self):
        return self.memory


class _Users(_Own):
    __module__ = "users"


def _moved(weight):
    return torch.nn.Parameter(weight.clone(), False)


def _set(name, value):
    return lambda module: setattr(module[1], name, value)


_CHANGES = {
    "mode": lambda module: module[0].eval(),
    "another module": lambda module: module.insert(0, torch.nn.Identity()),
    "an equal module": lambda module: module.__setitem__(0, torch.nn.Identity()),
    "a hook": lambda module: module[1].register_forward_hook(lambda *_: None),
    "a pre-hook": lambda module: module[1].register_forward_pre_hook(lambda *_: None),
    "a hook of gradients": lambda module: module[0].register_full_backward_hook(lambda *_: None),
    "moved weights": lambda module: setattr(module[1], "weight", _moved(module[1].weight)),
    "moved buffers": lambda module: setattr(module[1], "state", module[1].state.clone()),
    "dtype": lambda module: setattr(module[1].weight, "data", module[1].weight.view(torch.int32)),
    "strides": lambda module: setattr(module[1].state, "data", module[1].state.T),
    "a number": _set("factor", 2.0),
    "what a class of ours adds": lambda module: setattr(type(module[1]), "memory", 1),
}


@pytest.mark.parametrize("kind", [_Own, _Users])
@pytest.mark.parametrize("name", _CHANGES)
def test_what_a_capture_of_a_module_depends_on(monkeypatch, name, kind):
    monkeypatch.setattr(kind, "memory", 0)
    module = torch.nn.Sequential(torch.nn.Identity(), kind(3, 3))
    module[1].factor = 1.0
    module[1].weight.requires_grad_(False)
    module[1].register_buffer("state", torch.zeros(3, 3))
    before = _recording.kind_of_module(module)
    hash(before)
    module[1].weight.mul_(2)
    module[1].state.add_(1)
    assert _recording.kind_of_module(module) == before
    _CHANGES[name](module)
    assert _recording.kind_of_module(module) != before


@pytest.mark.parametrize(
    ("change", "back"),
    [
        (lambda: torch.use_deterministic_algorithms(True),
         lambda: torch.use_deterministic_algorithms(False)),
        (lambda: torch.set_autocast_dtype("cuda", torch.bfloat16),
         lambda: torch.set_autocast_dtype("cuda", torch.float16)),
        (lambda: torch.set_autocast_enabled("cuda", True),
         lambda: torch.set_autocast_enabled("cuda", False)),
    ],
)  # fmt: skip
def test_what_every_capture_depends_on(change, back):
    before = _recording.kind_of_module(None)
    change()
    try:
        inside = _recording.kind_of_module(None)
    finally:
        back()
    assert inside != before
    assert _recording.kind_of_module(None) == before


def test_the_precision_of_products_is_of_a_captures_kind():
    with tensor_float32(True):
        inside = _recording.kind_of_module(None)
    with tensor_float32(False):
        assert _recording.kind_of_module(None) != inside


def test_hooks_of_all_modules_are_of_a_captures_kind():
    before = _recording.kind_of_module(None)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert _recording.kind_of_module(None) != before
    finally:
        handle.remove()
    assert _recording.kind_of_module(None) == before
