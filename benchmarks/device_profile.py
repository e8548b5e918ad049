"""What keeps a GPU busy: kernels of a step, a flow's sampling, iterations and images of CoopFlow.

    python benchmarks/device_profile.py [steps] [account] [flow] [iterations] [images]

Each part prints lines and takes about a minute; what compiles takes longer the first time, and the
next run finds torch's caches on disk. Times are medians of a host's clock around work that is
waited for; "busy" adds up what the device's kernels took, under torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import bench_coop
import bench_sampler as bench
import torch
from bench_coop import LOW
from harness import OURS, Run, add_graph, full_float32, quiet_stderr, synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from coopflow_ext import Key, data, flows
from coopflow_ext.coop import TrainConfig, Trainer
from coopflow_ext.coop.model import CoopFlow, EventSpec
from coopflow_ext.errors import reason

PROBLEMS = {
    "mixture": bench.mixture,
    "mixture, closed form": bench.closed_form,
    "free score": bench.cheap_score,
    "MLP, 4,096 chains": bench.mlp(4096),
}
PAPERS_ENERGY = bench.convolutional(28, 128, 30, low_precision=True)
IGNORE = {"on_nonfinite": "ignore"}
OPTIONS: tuple[dict[str, Any], ...] = ({}, IGNORE, {"compile": True}, {"compile": True, **IGNORE})
ITERATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("reference, randn", {}),
    (OURS, {}),
    (OURS, {"cuda_graph": True}),
    (OURS, {**LOW, "cuda_graph": True}),
    (OURS, {"compile": True, "cuda_graph": True}),
    (OURS, {**LOW, "compile": True, "cuda_graph": True}),
)


_failed: list[str] = []


@contextmanager
def reported(what: str) -> Iterator[None]:
    """An error inside is printed, and costs what else there is to measure nothing."""
    try:
        yield
    except Exception as error:
        _failed.append(what)
        print(f"{what}: {type(error).__name__}: {reason(error)}", flush=True)


def median_seconds(run: Run, device: torch.device, rounds: int = 4) -> float:
    run()
    times = []
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def kernels(run: Run, device: torch.device) -> list[Any]:
    """What ran on the device in one call, by name, the most expensive first."""
    with quiet_stderr(), profile(activities=[ProfilerActivity.CUDA]) as log:
        run()
        synchronize(device)
    # Calls of the runtime are among the events too.
    ran = [event for event in log.key_averages() if event.device_type == DeviceType.CUDA]
    return sorted(ran, key=lambda e: -e.device_time_total)


def of(events: list[Any], parts: int = 1) -> str:
    """Number and time of kernels, for each of the parts of a call."""
    busy = sum(e.device_time_total for e in events) / parts
    return f"{sum(e.count for e in events) / parts:.1f} kernels, busy {busy:.2f} µs"


def steps(device: torch.device) -> None:
    """A step of whole chains, and of the plain loop."""
    for name, make in PROBLEMS.items():
        problem = make(device)
        for options in OPTIONS:
            if problem.is_score and "compile" in options:
                continue
            run = partial(problem.sampler(**options), problem.x0, key=bench.KEY)
            each = 1e6 * median_seconds(run, device) / problem.n_steps
            found = of(kernels(run, device), problem.n_steps)
            print(f"{name:22}{options!s:50}{each:8.2f} µs a step, {found}", flush=True)
        loop = partial(bench.plain_loop, problem, problem.score())
        each = 1e6 * median_seconds(loop, device) / problem.n_steps
        print(f"{name:22}{'plain loop':50}{each:8.2f} µs a step", flush=True)


def account(device: torch.device) -> None:
    """Every kernel of a step: ours step by step, and the graph of a loop that it has to meet."""
    for name, make in {**PROBLEMS, "the paper's energy, bfloat16": PAPERS_ENERGY}.items():
        problem = make(device)
        for compiled in (False, True):
            if compiled and problem.is_score:
                continue
            sampler = problem.sampler(compile=compiled, kernel=False)
            score = problem.compiled_score() if compiled else problem.score()
            runs: dict[str, Run] = {OURS: partial(sampler, problem.x0, key=bench.KEY)}
            missing: dict[str, str] = {}
            add_graph("graph", partial(bench.plain_loop, problem, score), runs, missing)
            for contestant, run in runs.items():
                each = 1e6 * median_seconds(run, device) / problem.n_steps
                events = kernels(run, device)
                label = f"{name}, {contestant}{', compiled' if compiled else ''}"
                print(f"{label:50}{each:9.2f} µs a step, {of(events, problem.n_steps)}", flush=True)
                show_first(12, events, problem.n_steps)
            for contestant, why in missing.items():
                print(f"{name}, {contestant}: {why}", flush=True)


def show_first(n: int, events: list[Any], parts: int = 1) -> None:
    """A line for each of the n most expensive kernels: how many in a part of the call, and time."""
    for e in events[:n]:
        each = e.device_time_total / e.count
        print(f"    {e.count / parts:8.2f} × {each:8.2f} µs  {e.key[:80]}", flush=True)


def flow(device: torch.device) -> None:
    """Sampling the paper's Flow++ at the batch of its training and of its evaluation."""
    model = flows.flowpp().to(device).eval()
    for n in (28, 250):
        run = partial(model.sample, n, key=Key(0))
        each, events = median_seconds(run, device), kernels(run, device)
        print(f"sample({n}): {1e3 * each:.1f} ms, {of(events)}", flush=True)
        show_first(8, events)


def iterations(
    device: torch.device, preset: str = "cifar10", given: dict[str, Any] = bench_coop.PAPER
) -> None:
    """CoopFlow with the paper's networks at batch 28, every part in every iteration, and memory."""
    for variant, settings in ITERATIONS:
        print(f"{variant}, {settings}: ", end="", flush=True)
        with reported(variant):
            iteration(device, variant, bench_coop.config_of(preset, **given, **settings))
        torch.cuda.empty_cache()


def iteration(device: torch.device, variant: str, config: TrainConfig) -> None:
    trainer = Trainer(config, data.load(config.data), device)
    torch.cuda.reset_peak_memory_stats(device)
    # Of a captured training the first three iterations run eagerly, and the fourth is captured.
    graph = config.cuda_graph is True
    run = trainer.train_step if graph else partial(bench_coop.time_iteration, trainer, variant)
    for _ in range(4 if graph else 1):
        run()
    seconds = median_seconds(run, device, 3)
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    print(f"{1e3 * seconds:.1f} ms, peak {peak:.2f} GiB", flush=True)
    if not graph:
        parts, _ = bench_coop.time_iteration(trainer, variant)
        print("    " + ", ".join(f"{n} {1e3 * t:.1f} ms" for n, t in parts.items()), flush=True)


def images(device: torch.device) -> None:
    """1,000 images of CIFAR-10's size by the paper's networks and sampling step."""
    for settings in ({}, LOW, {**LOW, "compile": True}):
        config = TrainConfig.from_dict({"preset": "cifar10", **settings})
        model = CoopFlow.from_config(config, EventSpec((3, 32, 32), 256)).to(device).eval()
        seconds = median_seconds(
            lambda model=model: model.sample(1000, Key(0), batch_size=250), device, 2
        )
        print(f"1,000 images, {settings}: {seconds:.2f} s", flush=True)


PARTS: dict[str, Callable[[torch.device], None]] = {
    part.__name__: part for part in (steps, account, flow, iterations, images)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    args = parser.parse_args()
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"part must be one of {', '.join(PARTS)}, got {name!r}")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    with full_float32():
        for name in args.parts or PARTS:
            with reported(name):
                PARTS[name](torch.device("cuda"))
    if _failed:
        raise SystemExit(f"not measured: {'; '.join(_failed)}")


if __name__ == "__main__":
    main()
