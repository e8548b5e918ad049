"""A run is a folder: settings, metrics, pictures, checkpoints, summary."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coopflow_ext.coop.board import Board
from coopflow_ext.coop.checkpoint import (
    checkpoint_path,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
    write_json,
)
from coopflow_ext.coop.config import TrainConfig
from coopflow_ext.coop.model import CoopFlow
from coopflow_ext.data import Dataset
from coopflow_ext.errors import RunError

__all__ = ["RunError", "RunFolder", "open_run"]


class RunFolder:
    """Reads and writes one run. Make it with :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self.config = config
        self.board: Board | None = None

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig) -> RunFolder:
        """A new run in a folder that is empty or does not exist yet.

        Raises:
            RunError: there is something already.
        """
        path = Path(path)
        cls.check_free(path)
        for part in ("samples", "checkpoints"):
            (path / part).mkdir(parents=True, exist_ok=True)
        run = cls(path, config)
        run.write_config()
        return run

    @staticmethod
    def check_free(path: str | Path) -> None:
        """RunError unless a run could be created at ``path``."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; choose another --out")
        if path.is_dir() and any(path.iterdir()):
            raise RunError(f"{path} exists: continue it with --resume, or choose another --out")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run.

        Raises:
            RunError: it is not a run, or of another version of the format.
        """
        path = Path(path)
        return cls(path, TrainConfig.of_run(path))

    def write_config(self) -> None:
        write_atomically(self.path / "config.json", self.config.to_json().encode())

    def adopt(self, config: TrainConfig | None, *, write: bool = True) -> None:
        """Take over the number of steps of ``config`` for a resumed run, and ``write`` it down.

        Raises:
            RunError: another setting differs, or the run has done more steps already.
        """
        if config is None or config == self.config:
            return
        mine, theirs = dataclasses.asdict(self.config), dataclasses.asdict(config)
        for name in mine:
            if name != "steps" and mine[name] != theirs[name]:
                raise RunError(
                    f"{self.path} was made with {name}={mine[name]!r}; --resume cannot change it "
                    f"to {theirs[name]!r} (only steps may change)"
                )
        done = self.checkpoints()
        if done and done[-1][0] > config.total_steps:
            raise RunError(
                f"{self.path} has done {done[-1][0]} steps already, more than the "
                f"{config.total_steps} asked for"
            )
        self.config = config
        if write:
            self.write_config()

    def close(self) -> None:
        """Write out what the board still holds."""
        if self.board is not None:
            self.board.close()
            self.board = None

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line."""
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.board is not None:
            self.board.scalars(metrics)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines; a last line that was cut off is left out."""
        if not self.metrics_path.exists():
            return []
        lines = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return lines

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will make again."""
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        write_atomically(self.metrics_path, "".join(kept).encode())

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, path) of every checkpoint, oldest first."""
        return checkpoints(self.path)

    def latest_checkpoint(self) -> Path:
        """The newest checkpoint; RunError when there is none."""
        return latest_checkpoint(self.path)

    def save(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
        """Write a checkpoint, then remove those that are too old to keep."""
        path = checkpoint_path(self.path, step)
        save_checkpoint(path, tensors, metadata)
        for _, old in self.checkpoints()[: -self.config.keep_checkpoints]:
            old.unlink()
        return path

    def load_latest(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The newest checkpoint.

        Raises:
            RunError: there is none, or it is damaged; the message names an older one.
        """
        latest = self.latest_checkpoint()
        try:
            return load_checkpoint(latest)
        except RunError as error:
            older = [path.name for _, path in self.checkpoints()[:-1]]
            advice = f"delete it to go on from {older[-1]}" if older else "there is no older one"
            raise RunError(f"{error}; {advice}") from error

    def picture_path(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:07d}.png"

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)

    def summary(self) -> dict[str, Any]:
        """``summary.json``; RunError when the run has not finished."""
        path = self.path / "summary.json"
        if not path.exists():
            raise RunError(f"{self.path} has no summary.json: the run has not finished")
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary


def open_run(path: Path, device: torch.device | str = "cpu") -> tuple[RunFolder, CoopFlow, Dataset]:
    """The run's folder, its trained models and its data."""
    run = RunFolder.open(path)
    return run, CoopFlow.load(path, device=device), run.config.load_data()
