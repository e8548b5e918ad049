"""What the CUDA compiler made of each kernel, read from the built library; no GPU is needed.

    python benchmarks/sass_report.py [--library PATH] [--kernel REGEX] [--json]
    python benchmarks/sass_report.py --write-limits tests/data/sass_limits.json

For each kernel and architecture: registers; stack frame and spill instructions (LDL, STL); global
loads and stores, and how many of them are 16 bytes wide; and the instructions per element of the
main loop, that is, of the innermost loop that stores most to global memory. Both sides of a branch
inside the loop are counted, so the figure is an upper bound of what one thread executes, as long as
the loop stores one result per element (it is too low by that factor otherwise).

The disassembler comes from a CUDA toolkit or from the PyPI packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm (in the `test` extra).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_LIBRARY = Path(__file__).parents[1] / "coopflow_ext" / "libcoopflow_ext.so"

_ARCH = re.compile(r"^\s*(?:arch = |code for )(sm_\w+)")
_FUNCTION = re.compile(r"^\s*Function\s*:?\s*([\w$.]+?):?\s*$")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_ITEM_BYTES = {"float16": 2, "half": 2, "float": 4, "double": 8}  # also bfloat16; first counts


class ToolMissingError(RuntimeError):
    """The disassembler is not installed."""


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers, such as LDG.E.128
    operands: str
    guarded: bool = False  # by a predicate

    def is_a(self, *names: str) -> bool:
        return self.opcode.split(".")[0] in names

    @property
    def width(self) -> int:
        """Bytes that one thread's memory access moves."""
        match = re.search(r"\.(?:U|S)?(8|16|64|128)(?:\.|$)", self.opcode)
        return int(match[1]) // 8 if match else 4

    @property
    def branch_target(self) -> int | None:
        match = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.is_a("BRA") else None
        return int(match[1], 16) if match else None

    @property
    def backward_target(self) -> int | None:
        target = self.branch_target
        # A branch to itself is the padding after the last instruction.
        return target if target is not None and target < self.address else None


@dataclass
class Kernel:
    """One kernel for one architecture."""

    symbol: str
    arch: str
    registers: int = 0
    stack_bytes: int = 0
    instructions: list[Instruction] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The kernel and its template arguments, without namespaces, result and arguments."""
        name = demangle(self.symbol).replace("(anonymous namespace)::", "")
        return re.sub(r"\w+::", "", name).partition("(")[0].removeprefix("void ")

    @property
    def item_bytes(self) -> int | None:
        """Size of the element type: the first template argument."""
        arguments = re.search(r"<(.*)", self.name)
        first = re.match(r"[^,<>]*", arguments[1]) if arguments else None
        words = first[0].lower() if first else ""
        return next((size for name, size in _ITEM_BYTES.items() if name in words), None)

    def count(self, *names: str, width: int | None = None) -> int:
        return sum(i.is_a(*names) and width in (None, i.width) for i in self.instructions)

    @property
    def loop_spans(self) -> list[tuple[int, int]]:
        """First and last address of each loop."""
        return [
            (target, i.address)
            for i in self.instructions
            if (target := i.backward_target) is not None
        ]

    @property
    def instructions_per_evaluation(self) -> int | None:
        """Fewest instructions of an element once round the loop that evaluates its mixture.

        That loop has a reciprocal for each component which a thread holds. Only for
        ``mixture_coupling_kernel<P, K, threads of an element, inverse>`` with K > 0 components in
        registers; the threads' instructions are added up.
        """
        match = re.search(r"mixture_coupling_kernel<[\w:]+, (\d+), (\d+), true>", self.name)
        if not match or match[1] == "0":
            return None
        components, threads = int(match[1]), int(match[2])
        loops = [
            [i for i in self.instructions if begin <= i.address <= end]
            for begin, end in self.loop_spans
        ]
        evaluating = [
            loop
            for loop in loops
            if sum(i.opcode.startswith("MUFU.RCP") for i in loop) >= components // threads
        ]
        return threads * shortest_way(min(evaluating, key=len)) if evaluating else None

    @property
    def main_loop(self) -> list[Instruction]:
        """The innermost loop that stores most bytes to global memory; empty if none stores."""
        spans = self.loop_spans
        innermost = [
            s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)
        ]
        loops = [
            [i for i in self.instructions if begin <= i.address <= end] for begin, end in innermost
        ]
        best = max(loops, key=stored_bytes, default=[])
        return best if stored_bytes(best) else []

    @property
    def instructions_per_element(self) -> float | None:
        loop, item = self.main_loop, self.item_bytes
        return len(loop) * item / stored_bytes(loop) if loop and item else None

    def facts(self) -> dict[str, object]:
        per_element = self.instructions_per_element
        return {
            "kernel": self.name,
            "arch": self.arch,
            "registers": self.registers,
            "stack_bytes": self.stack_bytes,
            "spill_instructions": self.count("LDL", "STL"),
            "loads": self.count("LDG", "LD"),
            "loads_16_bytes": self.count("LDG", "LD", width=16),
            "stores": self.count("STG", "ST"),
            "stores_16_bytes": self.count("STG", "ST", width=16),
            "instructions": len(self.instructions),
            "loop_instructions": len(self.main_loop),
            "instructions_per_element": None if per_element is None else round(per_element, 2),
            "instructions_per_evaluation": self.instructions_per_evaluation,
        }


def shortest_way(block: list[Instruction]) -> int:
    """Fewest instructions from the first of a block to its last, taking forward branches or not."""
    ways = {block[0].address: 1}
    for i, following in itertools.pairwise(block):
        if i.address not in ways:  # reached by no way
            continue
        always = i.opcode == "BRA" and not i.guarded and "P" not in i.operands
        targets = [i.branch_target] if i.branch_target is not None else []
        for address in targets if always else [*targets, following.address]:
            if address > i.address:
                ways[address] = min(ways.get(address, len(block)), ways[i.address] + 1)
    return ways[block[-1].address]


# What must not grow from one version of a kernel to the next, and what must not shrink.
CEILINGS = ("registers", "stack_bytes", "spill_instructions", "instructions")
FLOORS = ("loads_16_bytes", "stores_16_bytes")
Limits = dict[str, dict[str, int]]  # by "arch kernel"


def limits(kernels: list[Kernel]) -> Limits:
    """The facts of each kernel that :func:`worse` compares."""
    return {
        f"{k.arch} {k.name}": {
            name: value
            for name, value in k.facts().items()
            if name in CEILINGS + FLOORS and isinstance(value, int)
        }
        for k in kernels
    }


def worse(kernels: list[Kernel], committed: Limits) -> list[str]:
    """One line for each fact of a kernel that is worse than the committed one, or not committed.

    Architectures of which nothing is committed are left out.
    """
    architectures = {key.split()[0] for key in committed}
    lines = []
    for key, facts in limits([k for k in kernels if k.arch in architectures]).items():
        if key not in committed:
            lines.append(f"{key}: has no limits yet")
            continue
        for name, value in facts.items():
            limit = committed[key][name]
            if value > limit if name in CEILINGS else value < limit:
                lines.append(f"{key}: {name} is {value}, was {limit}")
    return lines


def stored_bytes(loop: list[Instruction]) -> int:
    return sum(i.width for i in loop if i.is_a("STG", "ST"))


def demangle(symbol: str) -> str:
    """The C++ name of a symbol, or the symbol itself where there is none."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = runtime.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not text:
        return symbol
    name = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    return name


def find_tool(name: str) -> Path:
    """A disassembler on PATH, else inside the installed `nvidia` packages.

    Raises:
        ToolMissingError: it is in neither place; the message says what to install.
    """
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for candidate in sorted(Path(folder).glob(f"*/bin/{name}")):
            return candidate
    raise ToolMissingError(
        f"{name} not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


def disassemble(library: Path, *options: str) -> Iterator[str]:
    """Lines of `cuobjdump OPTIONS LIBRARY`."""
    folders = [str(find_tool(tool).parent) for tool in ("cuobjdump", "nvdisasm")]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    command = [str(find_tool("cuobjdump")), *options, str(library)]
    done = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0 and "does not contain device code" not in done.stdout + done.stderr:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    yield from done.stdout.splitlines()


def read_kernels(library: Path, arch: str | None = None) -> list[Kernel]:
    """Every kernel of a library, once per architecture that it was compiled for, or for this one.

    A library is disassembled once in a process, which takes half a minute for each architecture.

    Raises:
        ToolMissingError: the disassembler is not installed.
        RuntimeError: the disassembler failed; the message is its own.
    """
    written_at = library.stat().st_mtime_ns if library.exists() else 0
    return _read_kernels(library, () if arch is None else ("-arch", arch), written_at)


@functools.lru_cache(maxsize=2)
def _read_kernels(library: Path, only: tuple[str, ...], _written_at: int) -> list[Kernel]:
    kernels: dict[tuple[str, str], Kernel] = {}
    for option in ("-res-usage", "-sass"):
        arch, kernel = "", None
        for line in disassemble(library, option, *only):
            if match := _ARCH.match(line):
                arch = match[1]
            elif match := _FUNCTION.match(line):
                key = (arch, match[1])
                kernel = kernels.setdefault(key, Kernel(symbol=match[1], arch=arch))
            elif kernel and (match := _RESOURCES.search(line)):
                kernel.registers, kernel.stack_bytes = int(match[1]), int(match[2])
            elif kernel and (match := _INSTRUCTION.match(line)):
                address, guard, opcode, operands = match.groups()
                kernel.instructions.append(
                    Instruction(int(address, 16), opcode, operands, guarded=guard is not None)
                )
    return [kernels[key] for key in sorted(kernels)]


def cuda_version(library: Path) -> str:
    """The CUDA compiler that built a library; "" when it has no CUDA code."""
    import torch

    torch.ops.load_library(library)
    version: str = json.loads(torch.ops.coopflow.build_info())["cuda_version"]
    return version


def table(kernels: list[Kernel]) -> str:
    rows = [
        (
            "arch",
            "regs",
            "stack",
            "spills",
            "ld16/ld",
            "st16/st",
            "instr/elem",
            "instr/eval",
            "kernel",
        )
    ]
    for kernel in kernels:
        f = kernel.facts()
        rows.append(
            (
                kernel.arch,
                str(f["registers"]),
                str(f["stack_bytes"]),
                str(f["spill_instructions"]),
                f"{f['loads_16_bytes']}/{f['loads']}",
                f"{f['stores_16_bytes']}/{f['stores']}",
                "-"
                if f["instructions_per_element"] is None
                else f"{f['instructions_per_element']}",
                "-"
                if f["instructions_per_evaluation"] is None
                else f"{f['instructions_per_evaluation']}",
                kernel.name,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--library", type=Path, help="default: $COOPFLOW_LIBRARY, else the package's"
    )
    parser.add_argument("--kernel", default="", help="regular expression that names must match")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--write-limits", type=Path, help="write what tests/test_sass_report.py holds kernels to"
    )
    args = parser.parse_args()
    library = args.library or Path(os.environ.get("COOPFLOW_LIBRARY") or DEFAULT_LIBRARY)
    if not library.is_file():
        parser.error(f"no library at {library}; build it with `make build`")
    try:
        kernels = [k for k in read_kernels(library) if re.search(args.kernel, k.name)]
    except ToolMissingError as error:
        raise SystemExit(str(error)) from None
    if args.write_limits:
        record = {"cuda_version": cuda_version(library), "limits": limits(kernels)}
        args.write_limits.write_text(json.dumps(record, indent=1) + "\n")
    elif args.json:
        print(json.dumps([k.facts() for k in kernels], indent=1))
    else:
        print(table(kernels) if kernels else f"{library} holds no such CUDA kernel")


if __name__ == "__main__":
    main()
