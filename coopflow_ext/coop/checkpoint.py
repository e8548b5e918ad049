"""Files that are either the old one or the new one, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from coopflow_ext.errors import RunError

_METADATA = "coopflow"
_CHECKPOINT = re.compile(r"step-(\d+)\.safetensors")


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
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk does not say of which file it speaks
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, content: object) -> None:
    """Indented, for readers; written atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def save_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Tensors and a JSON-able dictionary as one safetensors file, written atomically."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(on_cpu, metadata={_METADATA: json.dumps(metadata)}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of :func:`save_checkpoint`.

    Raises:
        RunError: the file is missing, truncated, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = (file.metadata() or {}).get(_METADATA)
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        if not path.exists():
            raise RunError(f"{path} does not exist") from error
        raise RunError(f"{path} is truncated or not a checkpoint: {error}") from error
    if metadata is None:
        raise RunError(f"{path} is a safetensors file, but not a checkpoint of coopflow_ext")
    return tensors, json.loads(metadata)


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of this step lies in a run folder."""
    return run / "checkpoints" / f"step-{step:07d}.safetensors"


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint of a run folder, oldest first."""
    found = []
    for path in (run / "checkpoints").glob("*.safetensors"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run folder; RunError when there is none."""
    found = checkpoints(run)
    if not found:
        raise RunError(f"{run} has no checkpoint yet")
    return found[-1][1]


def module_state(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """All tensors named ``prefix.NAME``, by NAME: what a module's ``load_state_dict`` checks."""
    start = prefix + "."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The state of an optimizer as named tensors: ``prefix.INDEX.NAME``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str
) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "."):
            _, index, key = name.rsplit(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
