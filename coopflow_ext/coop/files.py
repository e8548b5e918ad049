"""Files that are either the old one or the new one, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from coopflow_ext.errors import RunError

# Deeper than anything that this package writes, and shallow enough for every function that walks
# through it by recursion.
_MAX_DEPTH = 64
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
_STEP = re.compile(r"step-(\d+)")


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside ``path``, sync, rename.

    Raises:
        OSError: the disk is full or not writable; ``path`` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # on a file system that has become read-only
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk does not say of which file it speaks
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def step_of(path: Path) -> int | None:
    """The number in a name such as step-0000012.png; None where there is none."""
    match = _STEP.fullmatch(path.stem)
    return int(match[1]) if match else None


def by_step(folder: Path, suffix: str) -> list[tuple[int, Path]]:
    """(step, path) of the files with such names, oldest first."""
    found = ((step_of(path), path) for path in folder.glob(f"*{suffix}"))
    return sorted((step, path) for step, path in found if step is not None)


def is_temporary(path: Path) -> bool:
    """Whether a file has the name of one that is being written, or was when its writer died."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove what processes were writing below ``folder`` when they were killed: the temporary
    files of those that this machine does not have (any more)."""
    for path in folder.rglob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _runs(int(match[1])):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether there is such a process, other than this one."""
    return process != os.getpid() and Path(f"/proc/{process}").exists()


def write_json(path: Path, content: object) -> None:
    """Indented, for readers; written atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Add a line; OSError, which names the file, where the disk is full or not writable."""
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def parse_json(content: str | bytes) -> Any:
    """What JSON in UTF-8 says.

    Raises:
        ValueError: it is not that, or nested deeper than anything of this package.
    """
    too_deep = f"it is nested more than {_MAX_DEPTH} deep"
    try:
        value = json.loads(content.decode() if isinstance(content, bytes) else content)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [part for holder in level for part in _parts(holder)]
    if level:
        raise ValueError(too_deep)
    return value


def _parts(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; RunError, which names the file, where it holds none."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it must hold an object, got {content!r:.40}")
    return content


def read_json(path: Path) -> Any:
    """What a JSON file says; RunError, which names the file, where it cannot be read."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: it cannot be read as JSON: {error}") from error
