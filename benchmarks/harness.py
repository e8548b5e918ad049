"""How this project measures: in turns within one process, and checked before it is timed.

A `Case` builds a `Contest`: the functions to compare, "ours" first, a check of all of them, and the
bytes that each has to move. `measure` checks, warms up, chooses how many calls make one sample, and
takes one sample of every contestant per round, in an order that turns with the round. So a machine
that others use slows all of them alike, and the ratio of a round is a paired observation. Reported
are the median and the 20th and 80th percentile over rounds. All compute float32 in float32: none
uses TF32.

Time comes from device events on CUDA and from the host's clock on the CPU. A case with `cold` works
through copies of its data that together exceed four times the last-level cache.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from coopflow_ext._extension import native
from coopflow_ext._recording import CaptureError, Recording

Run = Callable[[], Any]
OURS = "ours"
ROOT = Path(__file__).resolve().parent.parent
MAX_COPIES = 64
NOT_COMPILED = "compilation was left out of this run"
RESOLUTION = 0.01
"""Two equal functions differ by up to some 0.5% for good: addresses, placement of code. No ratio is
told from another that is nearer than this."""
EXPLAINED_BELOW = 0.6
"""A memory-bound contestant that reaches a smaller share of the copy's bandwidth says why."""
SMALL_SECONDS = 2e-5
"""What moves its bytes in less than this at the copy's bandwidth is bound by calls and launches."""


class WrongResultError(AssertionError):
    """A contestant computed something else than it should: no time of it means anything."""


@dataclass
class Contest:
    """What is timed on one set of data."""

    runs: dict[str, Run]
    check: Callable[[], None]
    """Raises AssertionError when a contestant is wrong; may change the data."""
    expected_bytes: Mapping[str, int] = field(default_factory=dict)
    """What a memory-bound contestant must read and write, with each operator's own traffic."""
    limited_by: Mapping[str, str] = field(default_factory=dict)
    """What else than memory limits a contestant that stays below `EXPLAINED_BELOW`."""
    missing: dict[str, str] = field(default_factory=dict)
    """Contestants that cannot run here, and why."""
    flops: int = 0
    """Of the matrix products and convolutions that one call needs; 0: none to speak of."""
    low_precision: bool = False
    """The products are in bfloat16, and are held to its rate."""
    own_memory: frozenset[str] = frozenset()
    """Contestants whose memory is not torch's allocator's during a call: JAX's, a CUDA graph's."""
    by_part: bool = False
    """The functions return seconds by part, "whole" among them, and are timed by that."""
    in_place: tuple[Tensor, ...] = ()
    """What every contestant changes where it lies, and `check` reads: a graph that was captured
    before somebody put new memory in its place would go on writing to the old."""


@dataclass(frozen=True)
class Case:
    """One comparison. `build(device, with_compile)` makes its data and functions."""

    name: str
    build: Callable[[torch.device, bool], Contest]
    elements: int
    steps: int = 1
    quick: bool = False
    cold: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int = 15
    sample_seconds: float = 0.02
    with_compile: bool = True


QUICK = Effort(rounds=7, sample_seconds=0.005, with_compile=False)
PYTEST = Effort(rounds=7, sample_seconds=0.005)
FULL = Effort()


# --- time -----------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def without_collection() -> Iterator[None]:
    """Python collects no cycles during a sample; between two it does.

    A full collection looks at all objects of the process, which took 250 ms after two compilations,
    and whoever allocates next would pay for what another left. timeit leaves it out too.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # so that collecting what a sample left takes no time
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def seconds_of(run: Run, calls: int, device: torch.device) -> float:
    """Seconds of one call, from `calls` calls in a row.

    Where these are several, two that are not timed come first. The caches hold what another
    contestant left, and to find its code again took a sampler's call 2 ms where it takes 0.12.
    """
    gc.collect()
    for _ in range(2 if calls > 1 else 0):
        run()
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def in_rotation(runs: list[Run]) -> Run:
    """A function that works on the next copy of the data at each call."""
    if len(runs) == 1:
        return runs[0]
    state = {"next": 0}

    def run() -> Any:
        index = state["next"]
        state["next"] = (index + 1) % len(runs)
        return runs[index]()

    return run


def paired_samples(
    runs: Mapping[str, Run], device: torch.device, effort: Effort
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per call of each contestant in each round, and the calls that make a sample."""
    for run in runs.values():
        seconds_of(run, 2, device)  # warm-up: compilation, allocator, caches
    with without_collection():
        calls = calls_of_a_sample(runs, device, effort)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for name in in_turns(list(runs), effort.rounds):
            samples[name].append(seconds_of(runs[name], calls[name], device))
    return samples, calls


def calls_of_a_sample(
    runs: Mapping[str, Run], device: torch.device, effort: Effort
) -> dict[str, int]:
    """How many calls of each contestant take as long as a sample should."""
    # The best of several, in turns: what else the machine does can hold up a few calls in a row.
    once = dict.fromkeys(runs, math.inf)
    for i in range(10):
        for name, run in runs.items():
            if i < 2 or once[name] < 2 * effort.sample_seconds:  # else one call is a sample
                once[name] = min(once[name], max(seconds_of(run, 2, device), 1e-7))
    calls = {}
    for name, seconds in once.items():
        # Contestants that are about as fast get the same number of calls: in a shorter sample the
        # clock and the first calls weigh more.
        rivals = [other for other in once.values() if seconds / 2 <= other <= 2 * seconds]
        calls[name] = max(1, min(100_000, math.ceil(effort.sample_seconds / min(rivals))))
    return calls


def in_turns(names: list[str], rounds: int) -> Iterator[str]:
    """Every name once in each round, each round in another order."""
    for i in range(rounds):
        turn = i // 2 % len(names)
        order = names[turn:] + names[:turn]
        yield from order if i % 2 == 0 else reversed(order)


def samples_by_part(runs: Mapping[str, Run], effort: Effort) -> dict[str, list[dict[str, float]]]:
    """Seconds by part of each contestant in each round."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    with without_collection():
        for name in in_turns(list(runs), effort.rounds):
            gc.collect()
            samples[name].append(runs[name]())
    return samples


# --- statistics -----------------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0]}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p20": tenths[1], "p80": tenths[7]}


def stats(values: list[float], calls: int) -> dict[str, Any]:
    """pytest-benchmark's fields for seconds per call, with p20 and p80 added."""
    several = len(values) > 1
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if several else values * 3
    mean, stddev = statistics.fmean(values), statistics.stdev(values) if several else 0.0
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    inside = [v for v in values if low <= v <= high]
    beyond = sum(abs(v - mean) > stddev for v in values)
    return {
        "min": min(values),
        "max": max(values),
        "mean": mean,
        "stddev": stddev,
        "rounds": len(values),
        "iterations": calls,
        "q1": q1,
        "q3": q3,
        "iqr": q3 - q1,
        "ld15iqr": min(inside),
        "hd15iqr": max(inside),
        "stddev_outliers": beyond,
        "iqr_outliers": len(values) - len(inside),
        "outliers": f"{beyond};{len(values) - len(inside)}",
        "ops": 1 / mean,
        "total": sum(values) * calls,
        **spread(values),
        "data": values,
    }


# --- what a computation needs ---------------------------------------------------------------------

# Operators that do not read their first argument, and those that move nothing at all.
_ONLY_WRITE = {
    "copy_", "normal_", "uniform_", "zero_", "fill_",
    "randn_like", "rand_like", "zeros_like", "ones_like", "full_like", "new_zeros",
}  # fmt: skip
_MOVE_NOTHING = {"empty", "empty_like", "empty_strided", "detach", "_local_scalar_dense"}


class _Counter(TorchDispatchMode):
    """Adds up what operators read and write, views apart, and their matrix arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        name = packet.__name__
        if func.is_view or name in _MOVE_NOTHING:
            return out
        read = args[1:] if name in _ONLY_WRITE else args
        options = {k: v for k, v in kwargs.items() if k != "out"}  # that is the result
        tensors = [t for t in tree_leaves((read, options, out)) if isinstance(t, Tensor)]
        # What is expanded is read from memory once.
        self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        return out


def counted_bytes(run: Run) -> int:
    """What the PyTorch operators of one call read and write."""
    with _Counter() as counter:
        run()
    return counter.bytes


def counted_flops(run: Run) -> int:
    """Floating-point operations of one call's matrix products and convolutions."""
    with _Counter() as counter:
        run()
    return counter.flops


# --- one case -------------------------------------------------------------------------------------


def checked(case: Case, device: torch.device, with_compile: bool) -> Contest:
    """A contest of the case whose contestants all gave the right result, where they should.

    Raises:
        WrongResultError: one of them did not.
    """
    contest = case.build(device, with_compile)
    try:
        check_memory(contest)
        with warnings.catch_warnings():
            # A sampler that cannot compile or capture warns and goes on without: another contest.
            for option in ("compile", "cuda_graph"):
                warnings.filterwarnings("error", message=f"{option}=", category=UserWarning)
            contest.check()
    except (AssertionError, UserWarning) as error:
        raise WrongResultError(
            f"{case.name}: wrong result, so nothing was timed: {error}"
        ) from error
    return contest


def check_memory(contest: Contest) -> None:
    """Raises AssertionError for a contestant that gives a tensor of `in_place` other memory."""
    before = [t.data_ptr() for t in contest.in_place]
    for name, run in contest.runs.items() if before else ():
        run()
        after = [t.data_ptr() for t in contest.in_place]
        assert after == before, f"{name}: replaces the memory of what it should change in place"


def copies_beyond_cache(case: Case, contest: Contest, device: torch.device) -> int:
    per_copy = contest.expected_bytes.get(OURS, 0)
    if not case.cold or not per_copy:
        return 1
    return min(MAX_COPIES, 1 + math.ceil(4 * cache_bytes(device) / per_copy))


def measure(
    case: Case, device: torch.device, effort: Effort, limits: Mapping[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Check and time a case: records in pytest-benchmark's format, and what was not measured."""
    # One compiled function may serve many cases, and torch stops compiling it after a few shapes.
    torch._dynamo.reset()
    contest = checked(case, device, effort.with_compile)
    gaps = [
        {"case": case.name, "contestant": name, "reason": reason}
        for name, reason in contest.missing.items()
    ]
    parts_of = {}
    copies = 1
    if contest.by_part:
        rows = samples_by_part(contest.runs, effort)
        samples = {name: [row["whole"] for row in parts] for name, parts in rows.items()}
        calls = dict.fromkeys(samples, 1)
        parts_of = {
            name: {part: statistics.median(r[part] for r in parts) for part in parts[0]}
            for name, parts in rows.items()
        }
    else:
        copies = copies_beyond_cache(case, contest, device)
        more = [checked(case, device, effort.with_compile) for _ in range(copies - 1)]
        runs = {n: in_rotation([c.runs[n] for c in (contest, *more)]) for n in contest.runs}
        samples, calls = paired_samples(runs, device, effort)
    records = []
    for name, values in samples.items():
        extra = facts(case, contest, name, statistics.median(values), limits)
        extra["copies"] = copies
        if name != OURS:
            ratios = [t / ours for t, ours in zip(values, samples[OURS], strict=True)]
            extra["ratio_to_ours"] = spread(ratios)
        if name in parts_of:
            extra["parts"] = parts_of[name]
        if name not in contest.own_memory:
            extra["memory_peak_bytes"] = peak_bytes(contest.runs[name], device)
        records.append(
            {
                "group": case.name,
                "name": name,
                "fullname": f"{case.name}[{name}]",
                "params": {"case": case.name, "contestant": name, "device": device.type},
                "options": {"cold": case.cold},
                "stats": stats(values, calls[name]),
                "extra_info": extra,
            }
        )
    return records, gaps


def facts(
    case: Case, contest: Contest, name: str, seconds: float, limits: Mapping[str, float]
) -> dict[str, Any]:
    """A contestant's time per step and element, and its shares of the device's limits."""
    extra: dict[str, Any] = {
        "elements": case.elements,
        "steps": case.steps,
        "nanoseconds_per_element": 1e9 * seconds / (case.elements * case.steps),
        "microseconds_per_step": 1e6 * seconds / case.steps,
    }
    if name in contest.expected_bytes:
        expected = contest.expected_bytes[name]
        at_best = expected / limits["copy_bytes_per_second"]
        extra["expected_bytes"] = expected
        extra["share_of_copy"] = at_best / seconds
        if at_best < EXPLAINED_BELOW * seconds:
            small = f"calls and launches: its bytes take {1e6 * at_best:.2g} µs"
            other = contest.limited_by.get(name, "not explained")
            extra["limited_by"] = small if at_best < SMALL_SECONDS else other
    if contest.flops:
        kind = "bfloat16" if contest.low_precision else "float32"
        extra["flops"] = contest.flops
        extra["share_of_matmul"] = contest.flops / seconds / limits[f"{kind}_flops_per_second"]
    return extra


def peak_bytes(run: Run, device: torch.device) -> int:
    """The peak of torch's allocator during one call, beyond what was allocated before."""
    if device.type != "cuda":
        return _cpu_peak_bytes(run)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Without what native code writes there: the profiler announces each of its starts."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _cpu_peak_bytes(run: Run) -> int:
    """The same on the CPU, from the profiler's record of what was allocated and freed when."""
    with (
        quiet_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as log,
    ):
        run()
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(live, default=0)


# --- the machine ----------------------------------------------------------------------------------


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache (L2 of a GPU)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=32 * 2**20)


def measured_limits(device: torch.device, quick: bool) -> dict[str, float]:
    """Copy bandwidth (read and written bytes) and the matrix rates of this device, now."""
    size = 4 * cache_bytes(device) // 4
    source, target = torch.rand(size, device=device), torch.empty(size, device=device)
    n = (1024 if quick else 2048) if device.type == "cpu" else 8192
    calls = 1 if device.type == "cpu" else 10  # so that a launch's own time does not count

    def best(run: Run, rounds: int) -> float:
        seconds_of(run, 1, device)
        return min(seconds_of(run, calls, device) for _ in range(rounds))

    def matrix_rate(dtype: torch.dtype) -> float:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return 2 * n**3 / best(lambda: torch.mm(a, b), rounds)

    rounds = 3 if quick else 10
    with full_float32():
        return {
            "copy_bytes_per_second": 2 * 4 * size / best(lambda: target.copy_(source), rounds),
            "float32_flops_per_second": matrix_rate(torch.float32),
            "bfloat16_flops_per_second": matrix_rate(torch.bfloat16),
        }


@contextmanager
def full_float32() -> Iterator[None]:
    """The same precision for every contestant: no TF32 in products or convolutions."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def machine(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a figure."""
    info: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python_version": platform.python_version(),
        "torch": torch.__version__,
        "tf32": False,
        "library": json.loads(native().build_info()),
        "device": device.type,
        "device_name": _cpu_name(),
    }
    if device.type == "cuda":
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        values = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or ""
        info |= {
            "device_name": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "nvidia_smi": {query: values.splitlines()},
        }
    return info


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, Any]:
    """Of this tree; a copy without git's history may name it in COOPFLOW_COMMIT."""
    if not (ROOT / ".git").exists():  # git would answer for a repository that the copy lies in
        return {"id": os.environ.get("COOPFLOW_COMMIT"), "dirty": None}
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"id": _output("git", "rev-parse", "HEAD"), "dirty": bool(status)}


def new_report(
    device: torch.device, limits: Mapping[str, float], command: str, quick: bool
) -> dict[str, Any]:
    """A report without cases: pytest-benchmark's top level, extended."""
    return {
        "version": "coopflow-bench-1",
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "quick": quick,
        "machine_info": machine(device),
        "commit_info": commit(),
        "limits": dict(limits),
        "benchmarks": [],
        "not_measured": [],
        "finished": [],
        "failed": [],
    }


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Written beside and renamed, so that an interruption leaves the last whole file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


# --- pytest-benchmark -----------------------------------------------------------------------------


def run_pytest(benchmark: Any, case: Case, device: torch.device) -> None:
    """Check and measure a case in turns; pytest-benchmark's own figure is of ours."""
    if device.type not in case.devices:
        import pytest

        pytest.skip(f"{case.name} does not run on {device.type}")
    limits = measured_limits(device, quick=True)
    with full_float32():
        records, gaps = measure(case, device, PYTEST, limits)
        benchmark.group = case.name
        benchmark.extra_info["contestants"] = {
            r["name"]: {**r["extra_info"], "seconds": r["stats"]["median"]} for r in records
        }
        benchmark.extra_info["limits"] = limits
        benchmark.extra_info["not_measured"] = gaps
        ours = checked(case, device, with_compile=True).runs[OURS]

        def run() -> None:
            ours()
            synchronize(device)

        benchmark.pedantic(run, rounds=5, warmup_rounds=1)


# --- pieces that several cases use ----------------------------------------------------------------


def pass_of(op: Callable[..., Tensor], given: Sequence[Tensor], backward: bool) -> Run:
    """The op without gradients, or with those of all that it is given, of a sum of its results."""
    if not backward:

        def run() -> Any:
            with torch.no_grad():
                return op(*given)

        return run
    leaves = tuple(t.detach().requires_grad_() for t in given)
    ones = torch.ones_like(op(*given))

    def run_both() -> Any:
        return torch.autograd.grad(op(*leaves), leaves, ones)

    return run_both


def add_graph(name: str, run: Run, runs: dict[str, Run], missing: dict[str, str]) -> None:
    """The run as one captured CUDA graph among the contestants, or why it cannot be captured.

    Its result is what the run returned, written anew.
    """
    results: list[Any] = []

    def kept() -> None:
        results[:] = [run()]

    try:
        device = torch.device("cuda", torch.cuda.current_device())
        recording = Recording(device)
        recording.add(name, kept, warm_up=run)
    except CaptureError as error:
        missing[name] = f"cannot be captured: {error}"
        return

    def replay() -> Any:
        recording.replay(name)
        return results[0]

    runs[name] = replay


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def command_line() -> str:
    """The command, with the output folder as DIR: where it lay is nobody's business."""
    line = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return re.sub(r"(?<=--out[ =])\S+", "DIR", line)
