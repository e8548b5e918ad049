"""``coopflow evaluate``: everything that can be measured of a finished run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coopflow_ext._modes import usual_modes
from coopflow_ext._optional import require
from coopflow_ext.coop.files import write_atomically
from coopflow_ext.coop.judge import Judge
from coopflow_ext.coop.model import CoopFlow
from coopflow_ext.coop.pictures import figure_bytes, save_panels, to_pixels
from coopflow_ext.coop.run import open_run
from coopflow_ext.data import Dataset
from coopflow_ext.metrics.fid import check_inception_installed, fid, read_statistics
from coopflow_ext.metrics.neighbours import nearest_neighbours
from coopflow_ext.rng import USE_EVALUATION, Key

_NEIGHBOURS_SHOWN = 16
_BATCH = 500


@usual_modes()
def evaluate_run(
    path: Path,
    *,
    n: int | None = None,
    seed: int = 0,
    inception: bool = False,
    fid_features: int | nn.Module = 2048,
    fid_stats: Path | None = None,
    export_png: Path | None = None,
    export_training: Path | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure a run; results in RUN/evaluation.

    Args:
        path: the run.
        n: number of samples; default that of the run's settings. Held-out data are compared by
            min(n, size of the held-out split) images.
        seed: of the samples.
        inception: also the FID of the n samples against the training images.
        fid_stats: the FID against the statistics in this file instead, see
            :func:`coopflow_ext.metrics.fid.read_statistics`.
        fid_features: see :func:`coopflow_ext.metrics.fid.fid`.
        export_png: a folder, new or empty, for the samples as PNG, as pytorch-fid wants them.
        export_training: the same for the training images.
        device: where to sample.

    Returns:
        What RUN/evaluation/summary.json holds.

    Raises:
        ImportError: ``inception`` without torchmetrics or torch-fidelity.
        FileExistsError: a folder for PNG is not empty, or is the working directory.
        OSError: RUN/evaluation cannot be written to; nothing was computed.
        ValueError: n below 2, no such statistics, one folder for both kinds of PNG, or FID or PNG
            of a run on vectors.
    """
    inception = inception or fid_stats is not None
    if inception and isinstance(fid_features, int):
        check_inception_installed()
    folders = [f for f in (export_png, export_training) if f is not None]
    for folder in folders:
        _check_empty(folder)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"samples and training images must go into two folders, got {export_png}")
    reference = None if fid_stats is None else read_statistics(fid_stats)
    run, model, data = open_run(path, device)
    if not data.is_image and (inception or folders):
        raise ValueError(f"FID and PNG are for images, and {data.name} holds vectors")
    n = run.config.n_samples if n is None else n
    if n < 2:
        raise ValueError(f"n must be ≥ 2, got {n}")
    out = run.study_folder("evaluation")
    judge = Judge(data, run.config)
    key = Key(seed).fold_in(USE_EVALUATION)
    proposals, samples = (x.cpu() for x in model.sample_pairs(n, key, batch_size=_BATCH))
    if export_png is not None:
        export(samples, export_png)
    if export_training is not None:
        export(data.decode(data.train), export_training)
    held_out = judge.held_out[:n]
    facts = judge.facts(model)
    summary: dict[str, Any] = {
        "n": n,
        "fd": {
            **facts["fd"],
            "n": n,
            "n_held_out": len(held_out),
            "held_out": judge.distance(held_out),
            "flow": judge.distance(proposals),
            "langevin": judge.distance(samples),
        },
        "bits_per_dim": facts["bits_per_dim"],
        "energy": energy_statistics(
            model, {"data": held_out, "proposals": proposals, "samples": samples}
        ),
        "neighbours": neighbour_distances(data, samples, held_out, out / "neighbours.png"),
    }
    save_histograms(out / "energies.png", summary["energy"])
    if inception:
        training = (data.decode(rows) for rows in data.train.split(_BATCH))
        real = training if reference is None else reference
        summary["fid"] = fid(real, samples.split(_BATCH), features=fid_features, device=device)
        summary["fid_of"] = "training images" if fid_stats is None else str(fid_stats)
    if export_png is not None:
        summary["png"] = str(export_png)
    for values in summary["energy"].values():
        values.pop("values")
    return run.write_study(out / "summary.json", summary)


@torch.no_grad()
def energy_statistics(model: CoopFlow, events: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation and values of U over each kind of events."""
    device = next(model.parameters()).device
    result = {}
    for name, x in events.items():
        u = torch.cat([model.energy(rows.to(device)).cpu() for rows in x.split(_BATCH)])
        result[name] = {"mean": float(u.mean()), "std": float(u.std()), "values": u.tolist()}
    return result


def neighbour_distances(
    data: Dataset, samples: Tensor, held_out: Tensor, picture: Path
) -> dict[str, float]:
    """Distances to the nearest training event; for images a picture of samples beside them.

    Copies would lie much nearer to the training split than held-out data do.
    """
    training = data.decode(data.train)
    index, distance = nearest_neighbours(samples, training).unbind(1)
    result = {
        "median_distance_of_samples": float(distance.median()),
        "median_distance_of_held_out": float(nearest_neighbours(held_out, training)[:, 1].median()),
        "smallest_distance_of_samples": float(distance.min()),
    }
    if data.is_image:
        nearest = training[index[:_NEIGHBOURS_SHOWN].long()]
        pairs = torch.stack((samples[:_NEIGHBOURS_SHOWN], nearest), 1).flatten(0, 1)
        save_panels(picture, {"sample | nearest training image": pairs}, columns=8)
    return result


def save_histograms(path: Path, kinds: dict[str, dict[str, Any]]) -> None:
    """Histograms of the energies over common bins."""
    figure_module = require("matplotlib.figure", extra="train", distribution="matplotlib")
    figure = figure_module.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    values = torch.cat([torch.tensor(kind["values"]) for kind in kinds.values()])
    bins = torch.linspace(float(values.min()), float(values.max()), 50).tolist()
    for name, kind in kinds.items():
        axes.hist(kind["values"], bins=bins, density=True, histtype="step", label=name)
    axes.set_xlabel("energy U")
    axes.set_ylabel("density")
    axes.legend()
    write_atomically(path, figure_bytes(figure))


def _check_empty(folder: Path) -> None:
    if folder.resolve() == Path.cwd():
        raise FileExistsError(f"{folder} must be another folder than the working directory")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} must be a new or empty folder")


def _numbered(images: Tensor) -> Iterator[tuple[str, Any]]:
    for i, pixels in enumerate(to_pixels(images)):
        yield f"{i:06d}.png", pixels


def export(images: Tensor, folder: Path) -> None:
    """Images as 000000.png, 000001.png, …, 8 bits for each of three channels.

    The folder appears with all of them in it, or not at all.
    """
    image = require("PIL.Image", extra="train", distribution="pillow")
    folder = folder.resolve()  # a link to a folder cannot be replaced by one
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        for name, pixels in _numbered(images):
            image.fromarray(pixels).save(made / name)
        made.replace(folder)  # also where an empty folder is there already
