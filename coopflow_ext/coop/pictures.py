"""Pictures of samples and curves of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from coopflow_ext._optional import require
from coopflow_ext.coop.curves import CURVES, points_of
from coopflow_ext.coop.files import write_atomically
from coopflow_ext.data.dataset import to_bytes
from coopflow_ext.data.toy import EXTENT

_MIN_TILE = 32
_BORDER = 2
_MARGIN = 8
_CAPTION = 14

Pixels = npt.NDArray[np.uint8]


def check_installed() -> None:
    """ImportError, with what to install, unless pictures can be made."""
    require("PIL.Image", extra="train", distribution="pillow")
    require("matplotlib.figure", extra="train", distribution="matplotlib")


def to_pixels(x: Tensor) -> Pixels:
    """Images (B, C, H, W) in [−1, 1], C = 1 or 3 → (B, H, W, 3) uint8, rounded to 256 levels."""
    rows = to_bytes(x.detach().float().cpu()).permute(0, 2, 3, 1)
    pixels: Pixels = rows.contiguous().numpy()
    return pixels


def grid(x: Tensor, columns: int) -> Pixels:
    """Images in rows of ``columns`` on a white ground, small ones enlarged by whole factors."""
    pixels = to_pixels(x)
    scale = max(1, -(-_MIN_TILE // pixels.shape[2]))
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + _BORDER), columns * (width + _BORDER), 3), 255, np.uint8)
    for i, tile in enumerate(pixels):
        top, left = (i // columns) * (height + _BORDER), (i % columns) * (width + _BORDER)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def save_panels(path: Path, panels: Mapping[str, Tensor], columns: int = 8) -> None:
    """Write several panels side by side, each under its caption, as one PNG.

    Images (B, C, H, W) become grids with so many columns, points (B, 2) clouds; of longer vectors
    the first two elements are shown.
    """
    if any(x.ndim == 2 for x in panels.values()):
        figure_module = require("matplotlib.figure", extra="train", distribution="matplotlib")
        figure = figure_module.Figure(figsize=(4 * len(panels), 4.2), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (caption, x) in zip(all_axes, panels.items(), strict=True):
            scatter(axes, x, caption)
        write_atomically(path, figure_bytes(figure))
        return
    image = require("PIL.Image", extra="train", distribution="pillow")
    draw = require("PIL.ImageDraw", extra="train", distribution="pillow")
    grids = {caption: grid(x, columns) for caption, x in panels.items()}
    width = sum(g.shape[1] for g in grids.values()) + _MARGIN * (len(grids) + 1)
    height = max(g.shape[0] for g in grids.values()) + 2 * _MARGIN + _CAPTION
    canvas = image.new("RGB", (width, height), "white")
    left = _MARGIN
    for caption, pixels in grids.items():
        draw.Draw(canvas).text((left, _MARGIN // 2), caption, fill="black")
        canvas.paste(image.fromarray(pixels), (left, _MARGIN + _CAPTION))
        left += pixels.shape[1] + _MARGIN
    save_image(path, canvas)


def save_image(path: Path, canvas: Any) -> None:
    """A PIL image as PNG, written atomically."""
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def scatter(axes: Any, x: Tensor, title: str) -> None:
    """Points as a cloud over [−4, 4]²; a few points are drawn larger."""
    a, b = x[:, :2].detach().float().cpu().unbind(1)
    axes.scatter(a.numpy(), b.numpy(), s=2 if len(x) > 500 else 10, linewidths=0)
    axes.set_xlim(-EXTENT, EXTENT)
    axes.set_ylim(-EXTENT, EXTENT)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=10)


def figure_bytes(figure: Any, dpi: int = 100) -> bytes:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save_curves(path: Path, metrics: list[dict[str, Any]]) -> None:
    """Draw what ``metrics.jsonl`` holds over the steps, one panel for each quantity."""
    figure_module = require("matplotlib.figure", extra="train", distribution="matplotlib")
    panels = [(curve, lines) for curve in CURVES if (lines := points_of(curve, metrics))]
    rows = -(-len(panels) // 3)
    figure = figure_module.Figure(figsize=(13, 3.2 * rows), layout="constrained")
    for place, (curve, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 3, place)
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
        axes.set_title(curve.title, fontsize=10)
        axes.set_xlabel("step")
        if curve.log:
            axes.set_yscale("log")
        axes.legend(fontsize=8)
    write_atomically(path, figure_bytes(figure))


def save_array(path: Path, x: Tensor) -> None:
    """The numbers themselves as a NumPy file."""
    buffer = io.BytesIO()
    np.save(buffer, x.detach().cpu().numpy(), allow_pickle=False)
    write_atomically(path, buffer.getvalue())
