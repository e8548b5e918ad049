"""How this project measures: in turns within one process, and checked before it is timed.

A `Case` builds a `Contest`: the functions to compare, "ours" first, a check of all of them, and the
bytes that each has to move. `measure` checks, warms up, chooses how many calls make one sample, and
takes one sample of every contestant per round, in an order that turns with the round. So a machine
that others use slows all of them alike, and the ratio of a round is a paired observation. Reported
are the median and the 20th and 80th percentile over rounds.

Time comes from device events on CUDA and from the host's clock on the CPU. A case with `cold` works
through copies of its data that together exceed four times the last-level cache.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]
OURS = "ours"
ROOT = Path(__file__).resolve().parent.parent
MAX_COPIES = 64
RESOLUTION = 0.01
"""Two equal functions differ by up to some 0.5% for good: addresses, placement of code. No ratio is
told from another that is nearer than this."""


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
    missing: dict[str, str] = field(default_factory=dict)
    """Contestants that cannot run here, and why."""
    by_part: bool = False
    """The functions return seconds by part, "whole" among them, and are timed by that."""


@dataclass(frozen=True)
class Case:
    """One comparison. `build(device, with_compile)` makes its data and functions."""

    name: str
    build: Callable[[torch.device, bool], Contest]
    elements: int
    steps: int = 1
    flops: int = 0
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
FULL = Effort()


# --- time -----------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Run, calls: int, device: torch.device) -> float:
    """Seconds of one call, from `calls` calls in a row."""
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
    # The best of several, in turns: what else the machine does can hold up a few calls in a row.
    passes = [{name: seconds_of(run, 2, device) for name, run in runs.items()} for _ in range(10)]
    once = {name: max(min(seconds[name] for seconds in passes), 1e-7) for name in runs}
    calls = {}
    for name, seconds in once.items():
        # Contestants that are about as fast get the same number of calls: in a shorter sample the
        # clock and the first call, which finds cold caches, weigh more.
        rivals = [other for other in once.values() if seconds / 2 <= other <= 2 * seconds]
        calls[name] = max(1, min(100_000, math.ceil(effort.sample_seconds / min(rivals))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(effort.rounds):
        turn = i // 2 % len(names)
        order = names[turn:] + names[:turn]
        for name in order if i % 2 == 0 else reversed(order):
            samples[name].append(seconds_of(runs[name], calls[name], device))
    return samples, calls


def samples_by_part(runs: Mapping[str, Run], effort: Effort) -> dict[str, list[dict[str, float]]]:
    """Seconds by part of each contestant in each round."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    names = list(runs)
    for name in names:
        runs[name]()
    for i in range(effort.rounds):
        for name in names if i % 2 == 0 else reversed(names):
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
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else None
    q1, q3 = (quarters[0], quarters[2]) if quarters else (values[0], values[0])
    mean = statistics.fmean(values)
    return {
        "min": min(values),
        "max": max(values),
        "mean": mean,
        "stddev": statistics.stdev(values) if len(values) > 1 else 0.0,
        "rounds": len(values),
        "iterations": calls,
        "q1": q1,
        "q3": q3,
        "iqr": q3 - q1,
        "ops": 1 / mean,
        "total": sum(values) * calls,
        **spread(values),
        "data": values,
    }


# --- one case -------------------------------------------------------------------------------------


def checked(case: Case, device: torch.device, with_compile: bool) -> Contest:
    """A contest of the case whose contestants all gave the right result.

    Raises:
        WrongResultError: one of them did not.
    """
    contest = case.build(device, with_compile)
    try:
        contest.check()
    except AssertionError as error:
        raise WrongResultError(
            f"{case.name}: wrong result, so nothing was timed: {error}"
        ) from error
    return contest


def copies_beyond_cache(case: Case, contest: Contest, device: torch.device) -> int:
    per_copy = contest.expected_bytes.get(OURS, 0)
    if not case.cold or not per_copy:
        return 1
    return min(MAX_COPIES, 1 + math.ceil(4 * cache_bytes(device) / per_copy))


def measure(
    case: Case, device: torch.device, effort: Effort, limits: Mapping[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Check and time a case: records in pytest-benchmark's format, and what was not measured."""
    contest = checked(case, device, effort.with_compile)
    gaps = [
        {"case": case.name, "contestant": name, "reason": reason}
        for name, reason in contest.missing.items()
    ]
    if contest.by_part:
        rows = samples_by_part(contest.runs, effort)
        samples = {name: [row["whole"] for row in parts] for name, parts in rows.items()}
        calls = dict.fromkeys(samples, 1)
        parts_of = {
            name: {part: statistics.median(r[part] for r in parts) for part in parts[0]}
            for name, parts in rows.items()
        }
        copies = 1
    else:
        copies = copies_beyond_cache(case, contest, device)
        more = [checked(case, device, effort.with_compile) for _ in range(copies - 1)]
        runs = {n: in_rotation([c.runs[n] for c in (contest, *more)]) for n in contest.runs}
        samples, calls = paired_samples(runs, device, effort)
        parts_of = {}
    records = []
    for name, values in samples.items():
        per_call = statistics.median(values)
        extra: dict[str, Any] = {
            "elements": case.elements,
            "steps": case.steps,
            "copies": copies,
            "nanoseconds_per_element": 1e9 * per_call / (case.elements * case.steps),
            "microseconds_per_step": 1e6 * per_call / case.steps,
        }
        if name != OURS:
            ratios = [t / ours for t, ours in zip(values, samples[OURS], strict=True)]
            extra["ratio_to_ours"] = spread(ratios)
        if name in contest.expected_bytes:
            expected = contest.expected_bytes[name]
            extra["expected_bytes"] = expected
            extra["share_of_copy"] = expected / per_call / limits["copy_bytes_per_second"]
        if case.flops:
            extra["flops"] = case.flops
            extra["share_of_matmul"] = case.flops / per_call / limits["matmul_flops_per_second"]
        if name in parts_of:
            extra["parts"] = parts_of[name]
        if not contest.by_part:
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
    """Copy bandwidth (read and written bytes) and the float32 matrix rate of this device, now."""
    size = 4 * cache_bytes(device) // 4
    source, target = torch.rand(size, device=device), torch.empty(size, device=device)
    n = (1024 if quick else 2048) if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device) for _ in range(2))

    def best(run: Run, rounds: int) -> float:
        seconds_of(run, 1, device)
        return min(seconds_of(run, 1, device) for _ in range(rounds))

    rounds = 3 if quick else 10
    return {
        "copy_bytes_per_second": 2 * 4 * size / best(lambda: target.copy_(source), rounds),
        "matmul_flops_per_second": 2 * n**3 / best(lambda: torch.mm(a, b), rounds),
    }


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
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "device": device.type,
        "device_name": _cpu_name(),
    }
    if device.type == "cuda":
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        info |= {
            "device_name": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            query: _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
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
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"id": _output("git", "rev-parse", "HEAD"), "dirty": bool(status)}


def new_report(device: torch.device, limits: Mapping[str, float], command: str) -> dict[str, Any]:
    """A report without cases: pytest-benchmark's top level, extended."""
    return {
        "version": "coopflow-bench-1",
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine_info": machine(device),
        "commit_info": commit(),
        "limits": dict(limits),
        "benchmarks": [],
        "not_measured": [],
        "finished": [],
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
        pytest.skip(f"{case.name} does not run on {device.type}")
    limits = measured_limits(device, quick=True)
    records, gaps = measure(case, device, QUICK, limits)
    benchmark.group = case.name
    benchmark.extra_info["contestants"] = {r["name"]: r["extra_info"] for r in records}
    benchmark.extra_info["not_measured"] = gaps
    ours = checked(case, device, with_compile=False).runs[OURS]

    def run() -> None:
        ours()
        synchronize(device)

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


# --- pieces that several cases use ----------------------------------------------------------------


def cuda_graph(run: Run) -> Run:
    """The same work as one captured CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def command_line() -> str:
    """The command, with the output folder as DIR: where it lay is nobody's business."""
    line = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return re.sub(r"(?<=--out[ =])\S+", "DIR", line)
