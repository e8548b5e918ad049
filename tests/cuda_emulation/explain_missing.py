"""Runs a compiler; when it fails over something that the emulation may lack, says what and where.

explain_missing.py COMPILER ARGUMENT…
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HEADER = "tests/cuda_emulation/include/cuda_runtime.h"
INTRINSICS = "csrc/include/coopflow/intrinsics.h"
# How gcc and clang speak of a name that nothing declares.
_UNKNOWN_NAME = re.compile(
    r"(\S+?):(\d+):\d+: error: (?:"
    r"['‘](?P<gcc>[\w:]+)['’] (?:was not declared|has not been declared|does not name a type|"
    r"is not a member)"
    r"|there are no arguments to ['‘](?P<template>\w+)['’] that depend"
    r"|['‘][^'’]*['’] has no member named ['‘](?P<member>\w+)['’]"
    r"|(?:use of undeclared identifier|unknown type name|no member named) ['‘](?P<clang>\w+)['’])"
)
# Of `extern __shared__ T name[]`, in which __shared__ is static.
_DYNAMIC_SHARED = re.compile(
    r"(\S+?):(\d+):\d+: error: (?:conflicting specifiers in declaration of ['‘](?P<gcc>\w+)['’]"
    r"|cannot combine with previous '(?P<clang>extern)' declaration)"
)
_INLINE_ASSEMBLY = re.compile(
    r"(\S+?):(\d+):(?:\d+: error: (?:impossible|invalid \S+) constraint"
    r"| Error: no such instruction)"
)
_UNKNOWN_HEADER = re.compile(
    r"(\S+?):(\d+):\d+: fatal error: ['‘]?(?P<header>[\w./]+?)['’]?"
    r"(?:: No such file| file not found)"
)


def explanations(output: str) -> list[str]:
    """One line for each name or header in a compiler's output that it does not know.

    One that says where to look if there is none of them.
    """
    found = {}
    for match in _UNKNOWN_NAME.finditer(output):
        name = next(filter(None, match.groups()[2:]))
        found[name] = f"{match[1]}:{match[2]}: {name} is not emulated; declare it in {HEADER}"
    for match in _DYNAMIC_SHARED.finditer(output):
        what = f"extern __shared__ {match['gcc'] or ''}".strip()
        found[what] = (
            f"{match[1]}:{match[2]}: {what} is not emulated; {HEADER} says what to write instead"
        )
    for match in _INLINE_ASSEMBLY.finditer(output):
        found["asm"] = (
            f"{match[1]}:{match[2]}: inline assembly is not emulated; put it into {INTRINSICS} "
            "beside a host path of the same meaning"
        )
    for match in _UNKNOWN_HEADER.finditer(output):
        header = match["header"]
        folder = Path(HEADER).parent
        found[header] = (
            f"{match[1]}:{match[2]}: {header} is not emulated; write its stand-in in {folder}/"
        )
    if not found:
        found[""] = f"if the errors above are over what only CUDA has, declare that in {HEADER}"
    return [f"cuda_emulation: {text}" for text in found.values()]


def main() -> int:
    done = subprocess.run(sys.argv[1:], stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        for line in explanations(done.stderr):
            print(line, file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
