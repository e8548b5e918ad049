"""Runs a compiler; when it fails over something that the emulation may lack, says what and where.

explain_missing.py COMPILER ARGUMENT…
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HEADER = "tests/cuda_emulation/include/cuda_runtime.h"
# How gcc and clang speak of a name that nothing declares.
_UNKNOWN_NAME = re.compile(
    r"(\S+?):(\d+):\d+: error: (?:"
    r"['‘](?P<gcc>[\w:]+)['’] (?:was not declared|has not been declared|does not name a type|"
    r"is not a member)"
    r"|(?:use of undeclared identifier|unknown type name|no member named) ['‘](?P<clang>\w+)['’])"
)
_UNKNOWN_HEADER = re.compile(
    r"(\S+?):(\d+):\d+: fatal error: ['‘]?(?P<header>[\w./]+?)['’]?"
    r"(?:: No such file| file not found)"
)


def explanations(output: str) -> list[str]:
    """One line for each name or header in a compiler's output that it does not know."""
    found = {}
    for match in _UNKNOWN_NAME.finditer(output):
        name = match["gcc"] or match["clang"]
        found[name] = f"{match[1]}:{match[2]}: {name} is not emulated; declare it in {HEADER}"
    for match in _UNKNOWN_HEADER.finditer(output):
        header = match["header"]
        folder = Path(HEADER).parent
        found[header] = (
            f"{match[1]}:{match[2]}: {header} is not emulated; write its stand-in in {folder}/"
        )
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
