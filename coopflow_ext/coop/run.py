"""A run is a folder: settings, metrics, pictures, checkpoints, summary."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coopflow_ext.coop.board import Board
from coopflow_ext.coop.checkpoint import (
    checkpoint_path,
    checkpoints,
    latest_checkpoint,
    load_latest,
    save_checkpoint,
)
from coopflow_ext.coop.config import ADJUSTABLE, Change, ConfigFile, TrainConfig
from coopflow_ext.coop.contents import naming
from coopflow_ext.coop.files import (
    append_line,
    by_step,
    is_temporary,
    parse_json,
    read_object,
    sweep,
    sync,
    write_atomically,
    write_json,
)
from coopflow_ext.coop.lock import LOCK_NAME
from coopflow_ext.coop.model import CoopFlow
from coopflow_ext.coop.provenance import check_same_data
from coopflow_ext.data import Dataset
from coopflow_ext.errors import RunError, reason

__all__ = ["RunError", "RunFolder", "open_run"]


class RunFolder:
    """Reads and writes one run. Make it with :meth:`create` or :meth:`open`.

    Attributes:
        path: the folder.
        config: the settings.
        history: what resumed runs changed of them, oldest first.
        opened_at: the step of the newest checkpoint when it was opened; 0 without one.
    """

    def __init__(self, path: Path, config: TrainConfig, history: Sequence[Change] = ()) -> None:
        self.path = path
        self.config = config
        self.history = tuple(history)
        self.board: Board | None = None
        self.opened_at = max((step for step, _ in self.checkpoints()), default=0)

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig) -> RunFolder:
        """A new run in a folder that :meth:`check_free` lets through.

        Raises:
            RunError: there is something already.
        """
        path = Path(path)
        cls.check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, config)
        run.write_config()  # first: with it the folder is a run
        run.tidy()
        return run

    @staticmethod
    def check_free(path: str | Path) -> None:
        """RunError unless a run could be created at ``path``: there is nothing, or no more than
        what a process leaves that is killed before it has made a run."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; choose another --out")
        if path.is_dir() and not all(map(_is_left_over, path.iterdir())):
            if not (path / "config.json").exists():
                raise RunError(f"{path} is not empty, and no run; choose another --out")
            raise RunError(f"{path} exists: continue it with --resume, or choose another --out")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run.

        Raises:
            RunError: it is not a run, or of another version of the format.
        """
        path = Path(path)
        file = ConfigFile.read(path)
        return cls(path, file.config, file.history)

    def tidy(self) -> None:
        """Make what folders are missing, and remove what killed processes were writing. For the
        process that trains the run alone."""
        for part in ("samples", "checkpoints"):
            (self.path / part).mkdir(exist_ok=True)
        sweep(self.path)

    def write_config(self) -> None:
        write_atomically(self.path / "config.json", self.config.to_json(self.history).encode())

    def changes(
        self, config: TrainConfig, adjustable: Sequence[str] = ADJUSTABLE
    ) -> tuple[Change, ...]:
        """What of the settings ``config`` would change from the last checkpoint on.

        Raises:
            RunError: a setting that is not ``adjustable`` differs, or the run has done more steps
                already.
        """
        done = self.checkpoints()[-1][0] if self.checkpoints() else 0
        mine, theirs = self.config.to_dict(), config.to_dict()
        differing = [name for name in mine if mine[name] != theirs[name]]
        for name in differing:
            if name not in adjustable:
                raise RunError(
                    f"{self.path} was made with {name}={mine[name]!r}; --resume cannot change it "
                    f"to {theirs[name]!r} (only {', '.join(adjustable)} may change)"
                )
        if done > config.total_steps:
            raise RunError(
                f"{self.path} has done {done} steps already, more than the "
                f"{config.total_steps} asked for"
            )
        return tuple(
            Change(step=done, setting=name, before=mine[name], after=theirs[name])
            for name in differing
        )

    def adopt(self, config: TrainConfig, *, write: bool = True) -> None:
        """Take over the adjustable settings of ``config`` for a resumed run, and ``write`` them
        and what they were into config.json.

        Raises:
            RunError: see :meth:`changes`.
        """
        changes = self.changes(config)
        self.config, self.history = config, (*self.history, *changes)
        if write and changes:
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
        append_line(self.metrics_path, json.dumps(metrics))
        if self.board is not None:
            self.board.scalars(metrics)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines; a last line that was cut off is left out.

        Raises:
            RunError: another line is no object with a step; the message says which.
        """
        if not self.metrics_path.exists():
            return []
        written = self.metrics_path.read_bytes().splitlines(keepends=True)
        lines = []
        for number, line in enumerate(written, 1):
            try:
                values = parse_json(line)
                if type(values["step"]) is not int:
                    raise ValueError(f"step must be an int, got {values['step']!r:.40}")
            except (ValueError, TypeError, KeyError) as error:
                if number == len(written) and not line.endswith(b"\n"):
                    break
                raise RunError(
                    f"{self.metrics_path}, line {number}, must be a JSON object with a step: "
                    f"{reason(error)}; delete that line to go on"
                ) from error
            lines.append(values)
        return lines

    def forget_after(self, step: int) -> None:
        """Drop lines and pictures of steps that a resumed run will make again, if at all."""
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        write_atomically(self.metrics_path, "".join(kept).encode())
        for made, picture in self.pictures():
            if made > step:
                picture.unlink()

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, path) of every checkpoint, oldest first."""
        return checkpoints(self.path)

    def latest_checkpoint(self) -> Path:
        """The newest checkpoint; RunError when there is none."""
        return latest_checkpoint(self.path)

    def save(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
        """Write a checkpoint, then remove those that are too old to keep.

        The lines of what it has done are on the disk before it is.
        """
        if self.metrics_path.exists():
            sync(self.metrics_path)
        path = checkpoint_path(self.path, step)
        save_checkpoint(path, tensors, metadata)
        for _, old in self.checkpoints()[: -self.config.keep_checkpoints]:
            old.unlink()
        return path

    def load_latest(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The newest checkpoint.

        Raises:
            RunError: there is none, or it is damaged; the message names the last good one.
        """
        return load_latest(self.path)[1]

    def picture_path(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:07d}.png"

    def pictures(self) -> list[tuple[int, Path]]:
        """(step, path) of every picture of samples, oldest first."""
        return by_step(self.path / "samples", ".png")

    @property
    def divergence_path(self) -> Path:
        return self.path / "divergence.json"

    def write_divergence(self, facts: dict[str, Any]) -> None:
        """What is needed to reproduce that the training left the finite numbers."""
        write_json(self.divergence_path, facts)

    def study_folder(self, name: str) -> Path:
        """The folder for what is found out of a run. Made, and tried, before that takes its time.

        Raises:
            OSError: it cannot be written to.
        """
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder

    def write_study(self, path: Path, results: dict[str, Any]) -> dict[str, Any]:
        """What was found out of a run, and the step that it was opened at, which may be training
        on meanwhile; returns both."""
        results = {"step": self.opened_at, **results}
        write_json(path, results)
        return results

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)

    @property
    def is_finished(self) -> bool:
        """Whether it has made all the steps of its settings, which may have become more since."""
        if not (self.path / "summary.json").exists():
            return False
        summary = self.summary()
        done = summary.get("pretrain_steps"), summary.get("steps")
        return done == (self.config.pretrain_steps, self.config.steps)

    def summary(self) -> dict[str, Any]:
        """``summary.json``, of when the run finished last; RunError when it never has."""
        path = self.path / "summary.json"
        if not path.exists():
            raise RunError(f"{self.path} has no summary.json: the run has not finished")
        return read_object(path)


def _is_left_over(path: Path) -> bool:
    """Of a process that was killed before the folder was a run."""
    if path.is_dir():
        return path.name in ("samples", "checkpoints") and not any(path.iterdir())
    return path.name == LOCK_NAME or is_temporary(path)


def open_run(path: Path, device: torch.device | str = "cpu") -> tuple[RunFolder, CoopFlow, Dataset]:
    """The run's folder, its trained models and its data; a warning where these are others than it
    was trained with."""
    run = RunFolder.open(path)
    file, (tensors, metadata) = load_latest(path)
    with naming(file):
        model = CoopFlow.from_checkpoint(tensors, metadata)
    data = run.config.load_data()
    try:
        check_same_data(metadata, data)
    except RunError as error:
        warnings.warn(f"{file}: {error}", stacklevel=3)
    return run, model.to(device), data
