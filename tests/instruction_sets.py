"""The same program on every instruction set of this CPU, in a process each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

NAMES = ("baseline", "avx2", "avx512")


def fingerprints(program: str, *, two_threads: bool = False) -> dict[str, str]:
    """What a program prints, by instruction set; the tests can be imported in it, and its first
    argument is a number of threads.

    Args:
        program: Python source.
        two_threads: also with two, on the widest instruction set.
    """
    best = json.loads(torch.ops.coopflow.build_info())["cpu_isa"]
    found = {isa: _output(program, isa, 1) for isa in NAMES[: NAMES.index(best) + 1]}
    if two_threads:
        found["2 threads"] = _output(program, best, 2)
    return found


def _output(program: str, isa: str, threads: int) -> str:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, str(threads)],
        env={**os.environ, "COOPFLOW_CPU_ISA": isa, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
