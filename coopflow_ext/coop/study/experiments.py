"""The paper's experiments on a finished run: pictures and numbers in a folder of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coopflow_ext._modes import usual_modes
from coopflow_ext.coop import inversion
from coopflow_ext.coop.pictures import save_panels
from coopflow_ext.coop.run import open_run
from coopflow_ext.data import Dataset
from coopflow_ext.rng import Key


def held_out_images(data: Dataset, n: int, device: torch.device | str) -> Tensor:
    """The first n held-out events; ValueError when there are fewer, or vectors."""
    if not data.is_image:
        raise ValueError(f"this is for images, and {data.name} holds vectors")
    if not 1 <= n <= len(data.held_out):
        raise ValueError(f"n must be in [1, {len(data.held_out)}], got {n}")
    return data.decode(data.held_out[:n]).to(device)


@usual_modes()
def reconstruct_run(
    path: Path,
    *,
    n: int = 32,
    seed: int = 0,
    step_size: float | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Reconstruct held-out images: picture and errors in RUN/reconstruct.

    ``step_size`` is the δ of the chain, here and below; without it that of the training.
    """
    run, model, data = open_run(path, device)
    observed = held_out_images(data, n, device)
    out = run.study_folder("reconstruct")
    found = inversion.reconstruct(model, observed, Key(seed), step_size=step_size)
    panels = {"observed": observed, "start of the chain": found.start, "result": found.result}
    save_panels(out / "reconstruct.png", panels)
    return run.write_study(
        out / "errors.json",
        {
            "n": n,
            "steps": inversion.RECONSTRUCTION_STEPS,
            "step_size": inversion.chain_step_size(model, step_size),
            "error_per_pixel": float(found.error.mean()),
            "error_per_pixel_of_flow_proposals": float(found.untouched_error.mean()),
            "errors": found.error.tolist(),
            "error_per_pixel_by_step": found.error_by_step.tolist(),
            "picture": "reconstruct/reconstruct.png",
        },
    )


@usual_modes()
def inpaint_run(
    path: Path,
    *,
    n: int = 8,
    chains: int = 4,
    mask: Path | None = None,
    seed: int = 0,
    step_size: float | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Fill a hole in held-out images: mask grid and errors in RUN/inpaint.

    ``mask`` is a .npy file with a bool array (H, W), True where the pixel is known; without it,
    the hole of the paper.
    """
    run, model, data = open_run(path, device)
    observed = held_out_images(data, n, device)
    height, width = observed.shape[-2:]
    known = inversion.centre_hole(height, width) if mask is None else read_mask(mask)
    if known.shape != (height, width):
        raise ValueError(f"mask must have shape ({height}, {width}), got {tuple(known.shape)}")
    if bool(known.all()):
        raise ValueError("mask must leave a pixel unknown, got True for all of them")
    out = run.study_folder("inpaint")
    filled = inversion.inpaint(
        model, observed, known, Key(seed), chains=chains, step_size=step_size
    )
    holed = torch.where(known.to(observed.device), observed, 0.0)
    rows = torch.cat((observed[:, None], holed[:, None], filled), 1)
    caption = f"observed | known | {chains} fillings"
    save_panels(out / "inpaint.png", {caption: rows.flatten(0, 1)}, columns=chains + 2)
    hole = ~known
    error = (filled - observed[:, None])[..., hole].square().sum((2, 3)) / hole.sum()
    return run.write_study(
        out / "errors.json",
        {
            "n": n,
            "chains": chains,
            "step_size": inversion.chain_step_size(model, step_size),
            "unknown_pixels": int(hole.sum()),
            "error_per_unknown_pixel": float(error.mean()),
            "best_of_chains": float(error.min(1).values.mean()),
            "picture": "inpaint/inpaint.png",
        },
    )


def read_mask(path: Path) -> Tensor:
    """A bool array from a .npy file; ValueError when it is none."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"mask {path} cannot be read as a .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"mask {path} must be one .npy array, got several in one file")
    if array.dtype != np.bool_:
        raise ValueError(f"mask {path} must be bool, got {array.dtype}")
    return torch.from_numpy(array)


@usual_modes()
def interpolate_run(
    path: Path,
    *,
    n: int = 8,
    points: int = 21,
    seed: int = 0,
    step_size: float | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Lines between reconstructed held-out images, and between proposals: RUN/interpolate."""
    inversion.check_points(points)
    run, model, data = open_run(path, device)
    if data.is_image and not 1 <= n <= len(data.held_out) // 2:
        raise ValueError(f"n must be in [1, {len(data.held_out) // 2}], got {n}")
    observed = held_out_images(data, 2 * n, device)
    out = run.study_folder("interpolate")
    found = inversion.reconstruct(
        model,
        observed,
        Key(seed),
        steps=inversion.INPAINTING_STEPS,
        rate=inversion.INPAINTING_RATE,
        decay=inversion.INPAINTING_DECAY,
        step_size=step_size,
    )
    with model.evaluating():
        starts = model.propose(2 * n, Key(seed).fold_in(1))
    between, random_lines = (
        inversion.interpolate(model, x[:n], x[n:], points=points, step_size=step_size)[1]
        for x in (found.start, starts)
    )
    for name, lines in (("images", between), ("random", random_lines)):
        caption = f"from left to right, {points} points"
        save_panels(out / f"{name}.png", {caption: lines.flatten(0, 1)}, columns=points)
    ends = torch.cat((between[:, 0], between[:, -1]))
    return run.write_study(
        out / "errors.json",
        {
            "n": n,
            "points": points,
            "step_size": inversion.chain_step_size(model, step_size),
            "largest_difference_of_ends_to_reconstructions": float(
                (ends - found.result).abs().max()
            ),
            "reconstruction_error_per_pixel": float(found.error.mean()),
            "pictures": ["interpolate/images.png", "interpolate/random.png"],
        },
    )
