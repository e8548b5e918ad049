"""What keeps a GPU busy: kernels of a replayed step, a flow's sampling, images of a whole model.

    python benchmarks/device_profile.py [steps] [flow] [images]

Each part prints lines and takes about a minute. Times are medians of a host's clock around work
that is waited for; "busy" adds up what the device's kernels took, under torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bench_sampler as bench
import torch
from harness import Run, quiet_stderr, synchronize
from torch.profiler import ProfilerActivity, profile

from coopflow_ext import Key, flows
from coopflow_ext.coop import TrainConfig
from coopflow_ext.coop.model import CoopFlow, EventSpec

PROBLEMS = {
    "mixture": bench.mixture,
    "mixture, closed form": bench.closed_form,
    "free score": bench.cheap_score,
    "MLP, 4,096 chains": bench.mlp(4096),
}
IGNORE = {"on_nonfinite": "ignore"}
OPTIONS: tuple[dict[str, Any], ...] = ({}, IGNORE, {"compile": True}, {"compile": True, **IGNORE})


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
    return sorted(log.key_averages(), key=lambda e: -e.device_time_total)


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


def flow(device: torch.device) -> None:
    """Sampling the paper's Flow++ at the batch of its training and of its evaluation."""
    model = flows.flowpp().to(device).eval()
    for n in (28, 250):
        run = partial(model.sample, n, key=Key(0))
        each, events = median_seconds(run, device), kernels(run, device)
        print(f"sample({n}): {1e3 * each:.1f} ms, {of(events)}", flush=True)
        for e in events[:8]:
            print(f"    {e.count:5} × {e.device_time_total / e.count:8.1f} µs  {e.key[:80]}")


def images(device: torch.device) -> None:
    """1,000 images of CIFAR-10's size by the paper's networks and sampling step."""
    low = {"precision": "bfloat16", "flow_precision": "bfloat16"}
    for settings in ({}, low, {**low, "compile": True}):
        config = TrainConfig.from_dict({"preset": "cifar10", **settings})
        model = CoopFlow.from_config(config, EventSpec((3, 32, 32), 256)).to(device).eval()
        seconds = median_seconds(
            lambda model=model: [model.sample(250, Key(i)) for i in range(4)], device, 2
        )
        print(f"1,000 images, {settings}: {seconds:.2f} s", flush=True)


PARTS: dict[str, Callable[[torch.device], None]] = {
    part.__name__: part for part in (steps, flow, images)
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
    for name in args.parts or PARTS:
        PARTS[name](torch.device("cuda"))


if __name__ == "__main__":
    main()
