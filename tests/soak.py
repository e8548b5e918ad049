"""Chains, couplings and trainings without end, with memory that must stay flat.

    SOAK_MINUTES=20 python tests/soak.py

A line each minute: calls so far, bytes that the C library has handed out, resident memory. After a
tenth of the time, in which everything is made that stays, the bytes may grow by 1% and 4 MiB; the
process ends with 1 where they do not keep to that. Never part of the test suite.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import coopflow_ext as cf
from coopflow_ext import coop, flows
from coopflow_ext.energies import DoubleWellEnergy, MLPEnergy

TINY: dict[str, Any] = {
    "preset": "digits-small", "batch_size": 16, "langevin_steps": 3, "pretrain_steps": 3,
    "steps": 6,
    "n_samples": 20, "log_every": 3, "sample_every": 6, "checkpoint_every": 3,
    "flow_options": {"net": "mlp", "couplings": 2, "widths": [16]},
    "energy_options": {"widths": [16, 16]},
}  # fmt: skip


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


def bytes_in_use() -> int:
    """What malloc has handed out, large blocks included."""
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Mallinfo2
    info = libc.mallinfo2()
    return int(info.field4) + int(info.field7)  # hblkhd, uordblks


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def work() -> list[Callable[[int], object]]:
    """What is called in turn, with the number of the call."""
    network, x0 = MLPEnergy(2, (16, 16)), torch.zeros(64, 2)
    options: list[dict[str, Any]] = [
        {},
        {"kernel": False},
        {"kernel": False, "stats": True, "return_trajectory": True, "grad_norm": 1.0},
        {"kernel": False, "noise_before_gradient": True, "on_nonfinite": "freeze"},
        {"differentiable": True, "grad_clip": 1.0},
        {"autocast": torch.bfloat16},
    ]
    samplers = [
        cf.LangevinSampler(energy, n_steps=8, step_size=0.1, **chosen)
        for energy in (network, DoubleWellEnergy(1.0))
        for chosen in options
    ]
    flow = flows.flowpp((1, 8, 8), channels=8, blocks=1, components=4, dequant_blocks=0)
    image = torch.rand(4, 1, 8, 8) * 2 - 1
    flow.initialize(image)

    def chains(i: int) -> None:
        for sampler in samplers:
            sampler(x0, key=cf.Key(i))

    def refused(i: int) -> None:
        try:
            cf.ops.langevin_step_(x0, x0[:1], cf.Key(i).tensor(), drift=0.1)
        except ValueError:
            return

    def flow_step(i: int) -> None:
        flow.zero_grad()
        flow.log_prob(image, key=cf.Key(i)).sum().backward()
        with torch.no_grad():
            flow.sample(4, cf.Key(i))

    def training(i: int) -> None:
        if i % 50 == 0:
            with tempfile.TemporaryDirectory() as folder:
                coop.train(coop.TrainConfig.from_dict(TINY), Path(folder) / "run")

    return [chains, refused, flow_step, training]


def main() -> None:
    minutes = float(os.environ.get("SOAK_MINUTES", "20"))
    calls, tasks = 0, work()
    start = time.monotonic()
    next_line, after_warm_up, grown = start, None, 0
    while (now := time.monotonic()) < start + 60 * minutes:
        for task in tasks:
            task(calls)
        calls += 1
        if now < next_line:
            continue
        next_line = now + min(60.0, 6 * minutes)
        used = bytes_in_use()
        elapsed = (now - start) / 60
        print(
            f"{elapsed:6.1f} min  {calls:8d} rounds  in use {used / 2**20:8.2f} MiB  "
            f"resident {resident_bytes() / 2**20:8.1f} MiB",
            flush=True,
        )
        if after_warm_up is None and elapsed >= minutes / 10:
            after_warm_up = used
        if after_warm_up is not None:
            grown = used - after_warm_up
    assert after_warm_up is not None
    allowed = after_warm_up // 100 + 2**22
    print(f"grown by {grown} bytes after the warm-up, {allowed} allowed")
    sys.exit(grown > allowed)


if __name__ == "__main__":
    main()
