"""Builds and loads the emulated CUDA kernels, and runs `cf.ops` on them.

The kernels of csrc/cuda are registered as `torch.ops.coopflow_emulated.*` for CPU tensors, beside
the CPU ops. There are two builds: `coopflow_checked` looks for races, `coopflow_sanitized` has
AddressSanitizer and UndefinedBehaviorSanitizer and needs :func:`sanitizer_environment`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from coopflow_ext.ops import _call

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
# Devices of the emulation (emulation.h): few blocks, so that kernels loop; one block; no limit;
# few blocks with little shared memory.
FEW_BLOCKS, ONE_BLOCK, ALL_BLOCKS, LITTLE_MEMORY = range(4)
DRIVER = 13000  # the CUDA that the emulated driver serves: 13.0
# Blocks of the check of indices (index_check.cpp).
FAR_BLOCKS = (0, 1, (1 << 22) + 1, (1 << 23) - 1)


class BuildFailedError(RuntimeError):
    """The emulated kernels do not compile; the message is the compiler's."""


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def build_folder() -> Path:
    return Path(os.environ.get("COOPFLOW_EMULATION_BUILD", ROOT / "build" / "emulation"))


def build(
    target: str, *, csrc: Path = CSRC, folder: Path | None = None, kernels: str = "*.cu"
) -> Path:
    """Compiles what changed of one target of CMakeLists.txt; returns the library.

    Of `csrc`/cuda, the files that match `kernels`.

    Raises:
        BuildFailedError: with the compiler's output.
    """
    folder = folder or build_folder()
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake, ninja = (shutil.which(name, path=programs) for name in ("cmake", "ninja"))
    if not cmake or not ninja or not CSRC.is_dir():
        pytest.skip("the emulation needs cmake, ninja and the source tree")
    configure = [
        cmake, "-S", str(HERE), "-B", str(folder), "-G", "Ninja", "--log-level=NOTICE",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DTORCH_ROOT={Path(torch.__file__).parent}",
        f"-DCOOPFLOW_CSRC={csrc}",
        f"-DCOOPFLOW_KERNELS={kernels}",
    ]  # fmt: skip
    with _alone(folder):
        for command in (configure, [cmake, "--build", str(folder), "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise BuildFailedError(done.stdout + done.stderr)
    return folder / f"lib{target}.so"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time builds in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sanitizer_environment(*, threads: bool = False) -> dict[str, str]:
    """The variables with which a Python process can load a library built with sanitizers."""
    runtime = "libtsan.so" if threads else "libasan.so"
    preload = []
    for name in (runtime, "libstdc++.so"):
        path = subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(path).is_file():
            pytest.skip(f"{compiler()} has no {name}")
        preload.append(path)
    return {
        "LD_PRELOAD": " ".join(preload),
        # Python does not free what lives as long as the process.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


class Launch(NamedTuple):
    """A kernel, with its template arguments, and the blocks of its grid."""

    kernel: str
    blocks: int


class BankCount(NamedTuple):
    """Accesses to shared memory by one instruction (banks.cpp).

    Attributes:
        instruction: its address, see :meth:`Emulation.place`.
        requests: of a warp.
        passes: through the banks that they take.
        floor: passes that they would take without a conflict.
    """

    instruction: int
    requests: int
    passes: int
    floor: int


class Emulation:
    """A loaded build of the emulated kernels."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self.library = library
        self._c = ctypes.CDLL(str(library))
        self._c.cuda_emulation_take_launches.restype = ctypes.c_size_t
        self._c.cuda_emulation_counted_banks.restype = ctypes.c_size_t
        self.raw = torch.ops.coopflow_emulated

    @contextlib.contextmanager
    def ops(self) -> Iterator[None]:
        """`cf.ops` and its derivatives call the emulated kernels; new tensors are poisoned."""
        native, _call.coopflow = _call.coopflow, self.raw
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        try:
            yield
        finally:
            _call.coopflow = native
            torch.use_deterministic_algorithms(deterministic)

    @contextlib.contextmanager
    def settings(
        self,
        *,
        order: int = 0,
        device: int = FEW_BLOCKS,
        blocks: Sequence[int] = (),
        driver: int = DRIVER,
    ) -> Iterator[None]:
        """Order of blocks, warps and lanes (0: ascending, else a seed); device; blocks that run;
        the CUDA that the driver serves."""
        self._set(order, device, blocks, driver)
        try:
            yield
        finally:
            self._set(0, FEW_BLOCKS, (), DRIVER)

    def _set(self, order: int, device: int, blocks: Sequence[int], driver: int) -> None:
        self._c.cuda_emulation_set_order(ctypes.c_uint64(order))
        self._c.cuda_emulation_set_device(device)
        self._c.cuda_emulation_set_driver(driver)
        array = (ctypes.c_uint64 * len(blocks))(*blocks)
        self._c.cuda_emulation_set_blocks(array, ctypes.c_size_t(len(blocks)))

    @functools.cached_property
    def kernels(self) -> dict[int, str]:
        """Every kernel and template variant in the library: address and name.

        By the project's names: a kernel is NAME_kernel, a host function that launches one is
        run_NAME or launch_NAME.
        """
        symbols = subprocess.run(
            ["nm", "--demangle", str(self.library)],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": os.environ["PATH"]},  # not preloaded with a sanitizer
        ).stdout
        found = re.findall(r"^([0-9a-f]+) [tTwW] (?:void )?(.*)$", symbols, re.MULTILINE)
        names = {int(address, 16): _short_name(name) for address, name in found}
        return {
            a: n for a, n in names.items() if re.fullmatch(r"(?!run_|launch_)\w+_kernel(<.*>)?", n)
        }

    def take_launches(self) -> list[Launch]:
        """What was launched since the last call."""
        capacity = 1 << 20
        offsets, blocks = ((ctypes.c_uint64 * capacity)() for _ in range(2))
        count = self._c.cuda_emulation_take_launches(offsets, blocks, ctypes.c_size_t(capacity))
        return [
            Launch(self.kernels[offset], grid)
            for offset, grid in zip(offsets[:count], blocks[:count], strict=True)
        ]

    @contextlib.contextmanager
    def counted_banks(self) -> Iterator[list[BankCount]]:
        """Afterwards the list has each instruction that met shared memory inside."""
        counts: list[BankCount] = []
        self._c.cuda_emulation_count_banks()
        try:
            yield counts
        finally:
            capacity = 1 << 14
            numbers = (ctypes.c_uint64 * (4 * capacity))()
            n = self._c.cuda_emulation_counted_banks(numbers, ctypes.c_size_t(capacity))
            assert n <= capacity
            counts += [BankCount(*numbers[4 * i : 4 * i + 4]) for i in range(n)]

    def place(self, instruction: int) -> str:
        """Source lines of an instruction, innermost inlined function first."""
        self._c.cuda_emulation_place.restype = ctypes.c_char_p
        found: bytes = self._c.cuda_emulation_place(ctypes.c_uint64(instruction))
        return found.decode()

    def wrong_index(self) -> str:
        """The first wrong index that the cursors of items.cuh and reduce.cuh give; "" if none."""
        self._c.cuda_emulation_wrong_index.restype = ctypes.c_char_p
        found: bytes = self._c.cuda_emulation_wrong_index()
        return found.decode()

    def primitive(self, name: str) -> str:
        """What is wrong with one of the primitives of primitives.cpp, or what it reports."""
        self._c.cuda_emulation_primitive.restype = ctypes.c_char_p
        found: bytes = self._c.cuda_emulation_primitive(name.encode())
        return found.decode()

    def wrong_visits(self) -> int:
        """Threads of a grid in three dimensions that did not run exactly once."""
        count: int = self._c.cuda_emulation_wrong_visits()
        return count


def _short_name(symbol: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    symbol = symbol.replace("(anonymous namespace)::", "").partition("(")[0]
    return re.sub(r"\w+::", "", symbol)


@functools.cache
def load() -> Emulation:
    """`$COOPFLOW_EMULATION_LIBRARY`, else the build with the race check."""
    given = os.environ.get("COOPFLOW_EMULATION_LIBRARY")
    return Emulation(Path(given) if given else build("coopflow_checked"))


def misaligned(x: Tensor) -> Tensor:
    """A copy of x that starts one element after a 16-byte boundary and ends with its storage."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
