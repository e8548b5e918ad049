"""Instructions per element of the CPU loops and the CUDA kernels, against those kept here.

    python benchmarks/instruction_counts.py             count and compare
    python benchmarks/instruction_counts.py --update    count and keep

valgrind's callgrind counts the CPU loops, built for AVX2 by themselves; the count of a run is the
difference of programs that run a loop three times and once, so that start-up cancels. The counts of
CUDA kernels come from `sass_report`. Counts do not depend on how busy a machine is; they do depend
on compilers, so only counts of equal tools are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sass_report
from harness import ROOT

KEPT = Path(__file__).with_name("instruction_counts.json")
SOURCES = (
    "affine_coupling",
    "attention",
    "concat_elu",
    "gate_add_norm",
    "langevin",
    "mixture_logistic",
    "random",
    "weight_norm",
)
# As in CMakeLists.txt.
FLAGS = (
    "-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-mavx2", "-mfma", "-mf16c", "-DCOOPFLOW_ISA=avx2",
)  # fmt: skip
SLACK = 1.001  # addresses of buffers may change a copy's path


class CannotCountError(RuntimeError):
    """A tool is missing, or cannot run this code."""


def first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def cpu_tools() -> dict[str, str]:
    """The compiler and valgrind, by version.

    Raises:
        CannotCountError: one of them is missing, or the processor has no AVX2.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    valgrind = shutil.which("valgrind")
    if compiler is None or valgrind is None:
        missing = "a C++ compiler" if compiler is None else "valgrind"
        raise CannotCountError(f"{missing} is not installed")
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        raise CannotCountError("this processor has no AVX2")
    return {
        "compiler": first_line(compiler, "--version"),
        "valgrind": first_line(valgrind, "--version"),
        "flags": " ".join(FLAGS),
    }


def build_driver(folder: Path) -> Path:
    compiler, program = os.environ.get("CXX", "c++"), folder / "count_loops"
    loops = [ROOT / "csrc" / "cpu" / f"{source}_loops.cpp" for source in SOURCES]
    sources = [Path(__file__).with_name("count_loops.cpp"), *loops]
    includes = [f"-I{ROOT / 'csrc' / f}" for f in ("include", "", "cpu")]
    command = [compiler, *FLAGS, *includes, *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return program


def callgrind(program: Path, loop: str, runs: int) -> tuple[int, int]:
    """Instructions of the whole program, and elements of one run."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(program)]
    done = subprocess.run([*command, loop, str(runs)], capture_output=True, text=True, check=False)
    counted = re.search(r"Collected\s*:\s*(\d+)", done.stderr)
    if done.returncode != 0 or counted is None:
        raise CannotCountError(f"callgrind failed on {loop}: {done.stderr.strip()[-300:]}")
    return int(counted[1]), int(done.stdout)


def count_cpu() -> dict[str, float]:
    """Instructions per element of every loop.

    Raises:
        CannotCountError: callgrind cannot run it.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = build_driver(Path(folder))
        counts = {}
        for loop in subprocess.check_output([program], text=True).split():
            once, elements = callgrind(program, loop, 1)
            thrice, _ = callgrind(program, loop, 3)
            counts[loop] = round((thrice - once) / 2 / elements, 3)
        return counts


def cuda_tools() -> dict[str, str]:
    """Raises CannotCountError when the library holds no CUDA code."""
    from coopflow_ext._extension import native

    built = json.loads(native().build_info())
    if not built["cuda_architectures"]:
        raise CannotCountError("the native library was built without CUDA code")
    return {"nvcc": built["cuda_version"], "architectures": built["cuda_architectures"]}


def count_cuda(arch: str | None = None) -> dict[str, float]:
    """Instructions per element of every kernel whose main loop stores, or of those of an
    architecture.

    Raises:
        CannotCountError: the disassembler is not installed.
    """
    from coopflow_ext._extension import library_path

    try:
        kernels = sass_report.read_kernels(Path(library_path()), arch)
    except sass_report.ToolMissingError as error:
        raise CannotCountError(str(error)) from error
    return {
        f"{k.arch} {k.name}": round(k.instructions_per_element, 3)
        for k in kernels
        if k.instructions_per_element is not None
    }


def grown(kept: dict[str, float], now: dict[str, float]) -> list[str]:
    """One line for each count that rose."""
    return [
        f"{name}: {kept[name]} to {now[name]} instructions per element"
        for name in sorted(kept.keys() & now.keys())
        if now[name] > kept[name] * SLACK
    ]


SIDES = {"cpu": (cpu_tools, count_cpu), "cuda": (cuda_tools, count_cuda)}


def compare(side: str, count: Callable[[], dict[str, float]] | None = None) -> list[str]:
    """What grew on this side, or of the part of it that ``count`` counts.

    Raises:
        CannotCountError: nothing to compare; the message is the reason.
    """
    tools_of, count_all = SIDES[side]
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    tools = tools_of()
    if side not in kept:
        raise CannotCountError(f"no {side} counts are kept")
    if kept[side]["tools"] != tools:
        raise CannotCountError(f"kept with {kept[side]['tools']}, here is {tools}")
    return grown(kept[side]["counts"], (count or count_all)())


def update() -> None:
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for side, (tools_of, count) in SIDES.items():
        try:
            kept[side] = {"tools": tools_of(), "counts": count()}
        except CannotCountError as error:
            print(f"{side}: as before: {error}")
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="keep what is counted now")
    if parser.parse_args().update:
        update()
        return 0
    failed = False
    for side in SIDES:
        try:
            lines = compare(side)
        except CannotCountError as error:
            print(f"{side}: not compared: {error}")
            continue
        print("\n".join(lines) if lines else f"{side}: no count grew")
        failed |= bool(lines)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
