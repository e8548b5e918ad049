"""Checkpoints: named tensors and facts in one file, with a checksum over all of it."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from coopflow_ext.coop.divergence import check_finite
from coopflow_ext.coop.files import by_step, parse_json, step_of, write_atomically
from coopflow_ext.errors import RunError, reason

# Names in the metadata of the safetensors file.
_FACTS = "coopflow"
_CHECKSUM = "coopflow_sha256"

Loaded = tuple[dict[str, Tensor], dict[str, Any]]


def save_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Tensors and a JSON-able dictionary as one safetensors file, written atomically.

    Raises:
        NonFiniteError: a tensor is not finite; nothing was written.
        OSError: the disk is full or not writable; ``path`` is as it was before.
    """
    check_finite(tensors)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = json.dumps(metadata)
    header = {_FACTS: facts, _CHECKSUM: _checksum(on_cpu, facts)}
    write_atomically(path, save(on_cpu, metadata=header))


def load_checkpoint(path: Path) -> Loaded:
    """The inverse of :func:`save_checkpoint`.

    A file of an older version, which has no checksum, is read with a warning.

    Raises:
        RunError: the file is missing, damaged, or not one of ours.
        OSError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise RunError(f"{path} is a folder, not a checkpoint") from error
    try:
        tensors, header = load(content), _header(content)
    except MemoryError:
        raise
    except Exception as error:  # of any kind: there may be anything in a file
        raise RunError(f"{path} is truncated or not a checkpoint: {reason(error)}") from error
    if _FACTS not in header:
        raise RunError(f"{path} is a safetensors file, but not a checkpoint of coopflow_ext")
    # A checksum whose name was damaged must not pass for one that was never there.
    if unknown := sorted(header.keys() - {_FACTS, _CHECKSUM}):
        raise RunError(f"{path} is damaged: unknown metadata {unknown[0]!r}")
    facts = header[_FACTS]
    if header.get(_CHECKSUM) not in (None, _checksum(tensors, facts)):
        raise RunError(f"{path} is damaged: its content does not have its {_CHECKSUM}")
    try:
        metadata = parse_json(facts)
    except ValueError as error:
        raise RunError(f"{path} is damaged: its metadata cannot be read: {error}") from error
    if not isinstance(metadata, dict):
        raise RunError(f"{path} is damaged: its metadata must be an object, got {metadata!r:.40}")
    if _CHECKSUM not in header:
        warnings.warn(
            f"{path} has no {_CHECKSUM}, as files of older versions: damage to its numbers would "
            "not be seen",
            stacklevel=1,  # one place, so that a command that reads it twice says it once
        )
    return tensors, metadata


def _header(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, which its functions give for a file with a name in UTF-8
    alone."""
    size = int.from_bytes(content[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(content[8 : 8 + size])
    return header.get("__metadata__", {})


def _checksum(tensors: dict[str, Tensor], facts: str) -> str:
    """SHA-256 over names, dtypes, shapes and facts as JSON, then the tensors' bytes by name."""
    names = sorted(tensors)
    layout = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]
    digest = hashlib.sha256(json.dumps([layout, facts]).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of this step lies in a run folder."""
    return run / "checkpoints" / f"step-{step:07d}.safetensors"


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint of a run folder, oldest first."""
    return by_step(run / "checkpoints", ".safetensors")


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run folder; RunError when there is none."""
    found = checkpoints(run)
    if not found:
        raise RunError(f"{run} has no checkpoint yet")
    return found[-1][1]


def load_latest(run: Path) -> tuple[Path, Loaded]:
    """The newest checkpoint of a run folder, and its path.

    A training that goes on meanwhile may remove it before it is opened, and then has put a newer
    one in its place.

    Raises:
        RunError: there is none, or it is damaged; the message names the last good one.
    """
    while True:
        path = latest_checkpoint(run)
        try:
            return path, _load_step(path)
        except RunError as error:
            if latest_checkpoint(run) != path and not path.exists():
                continue
            raise RunError(f"{error}; {_last_good(run)}") from error


def _load_step(path: Path) -> Loaded:
    """A checkpoint that must be of the step that its name says."""
    tensors, metadata = load_checkpoint(path)
    named = step_of(path)
    if named is not None and metadata.get("step", named) != named:
        raise RunError(f"{path} is of another step than its name says: {metadata['step']!r:.40}")
    return tensors, metadata


def _last_good(run: Path) -> str:
    for _, older in reversed(checkpoints(run)[:-1]):
        try:
            _load_step(older)
        except RunError:
            continue
        return f"the last good checkpoint is {older.name}: delete what is newer to go on from it"
    return "there is no good one before it"
