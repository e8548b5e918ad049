"""``--log tensorboard``: scalars, pictures and histograms beside the run's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from coopflow_ext._optional import require
from coopflow_ext.coop.pictures import grid

LOGS = ("tensorboard",)


class Board:
    """Writes RUN/tensorboard.

    Raises:
        ImportError: tensorboard is missing; the message says what to install.
    """

    def __init__(self, path: Path, start: int) -> None:
        require("tensorboard", extra="tensorboard")
        module = require("torch.utils.tensorboard", extra="tensorboard")
        self.writer = module.SummaryWriter(str(path / "tensorboard"), purge_step=start)

    def scalars(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, line["step"])

    def events(self, kinds: dict[str, Tensor], energies: dict[str, Tensor], step: int) -> None:
        """Pictures of images and histograms of energies, by the name of what they show."""
        for name, x in kinds.items():
            if x.ndim == 4:
                self.writer.add_image(name, grid(x[:64], 8), step, dataformats="HWC")
        for name, u in energies.items():
            self.writer.add_histogram(f"energy/{name}", u, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
