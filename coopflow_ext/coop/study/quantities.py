"""The numbers of a run in words, for readers: what they are, their unit, which way is better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coopflow_ext.coop.curves import is_finite_number
from coopflow_ext.coop.study.chart import number

LESS, MORE = "less is better", "more is better"


@dataclass(frozen=True)
class Quantity:
    """A number of a JSON file in words; ``key`` is its path in there, with dots."""

    key: str
    words: str
    note: str = ""
    unit: str = ""


RUN = (
    Quantity(
        "bits_per_dim",
        "All held-out data under the flow",
        f"likelihood; {LESS}",
        "bits per dimension",
    ),
    Quantity(
        "moment_gap",
        "Gap of the moments of data and samples at the end",
        f"differences of mean and covariance, in units of the data; {LESS}",
    ),
    Quantity("moment_gap_start", "The same gap at the beginning", "to compare with"),
    Quantity(
        "kl_true_to_energy",
        "Divergence of the energy's density from the true one",
        f"Kullback-Leibler; {LESS}, 0 is equal",
        "nats",
    ),
    Quantity(
        "kl_true_to_flow",
        "Divergence of the flow's density from the true one",
        f"Kullback-Leibler; {LESS}, 0 is equal",
        "nats",
    ),
    Quantity(
        "fd.classifier_accuracy",
        "Accuracy of the classifier whose features measure distances",
        f"share of held-out data that it names correctly; {MORE}",
    ),
    Quantity("seconds", "Time of training", "", "s"),
    Quantity("iterations_per_second", "Speed", f"of both phases; {MORE}", "steps/s"),
    Quantity("flow_updates", "Updates of the flow that were taken"),
    Quantity("energy_updates", "Updates of the energy that were taken"),
)
_SPREAD = "mean energy, no unit"
_EVALUATION = (
    Quantity("fd.langevin", "Distance of the samples to the training data", f"Fréchet; {LESS}"),
    Quantity("fd.flow", "Distance of what the chains start from", f"Fréchet; {LESS}"),
    Quantity("fd.held_out", "Distance of held-out data", "Fréchet; to compare with"),
    Quantity("fid", "FID, with the features of Inception", LESS),
    Quantity(
        "bits_per_dim",
        "All held-out data under the flow",
        f"likelihood; {LESS}",
        "bits per dimension",
    ),
    Quantity("energy.data.mean", "Energy of held-out data", _SPREAD),
    Quantity("energy.samples.mean", "Energy of the samples", f"{_SPREAD}; near that of data"),
    Quantity("energy.proposals.mean", "Energy of what the chains start from", _SPREAD),
    Quantity(
        "neighbours.median_distance_of_samples",
        "Way from a sample to the nearest training event",
        "median, Euclidean; copies would lie much nearer than held-out data",
    ),
    Quantity(
        "neighbours.median_distance_of_held_out",
        "The same way from held-out data",
        "to compare with",
    ),
    Quantity("n", "Samples that were drawn"),
)
_RECONSTRUCT = (
    Quantity("error_per_pixel", "Error of the reconstructions", f"squared, per pixel; {LESS}"),
    Quantity(
        "error_per_pixel_of_flow_proposals",
        "Error of the chains before the search",
        "squared, per pixel; to compare with",
    ),
    Quantity("n", "Images"),
)
_INPAINT = (
    Quantity("error_per_unknown_pixel", "Error within the hole", f"squared, per pixel; {LESS}"),
    Quantity("best_of_chains", "Error of the best filling of each image", LESS),
    Quantity("chains", "Fillings of each image"),
    Quantity("n", "Images"),
)
_INTERPOLATE = (
    Quantity(
        "reconstruction_error_per_pixel",
        "Error of the reconstructions between which the lines lead",
        f"squared, per pixel; {LESS}",
    ),
    Quantity(
        "largest_difference_of_ends_to_reconstructions",
        "Largest difference of a line's ends from them",
        f"of a pixel in [−1, 1]; {LESS}",
    ),
    Quantity("n", "Lines"),
)
_DIAGNOSE = (
    Quantity("moment_gap.proposals", "Gap of the moments before Langevin", LESS),
    Quantity("moment_gap.samples", "The same after Langevin", LESS),
    Quantity(
        "drift.first",
        "Way of a chain at the first logged iteration",
        "root mean square per element, in units of the data",
    ),
    Quantity("drift.last", "The same at the last one", "to compare with"),
    Quantity("energy_of_held_out_data", "Energy of held-out data", _SPREAD),
    Quantity("n", "Chains"),
)


@dataclass(frozen=True)
class Study:
    """What another command left in a folder of the run."""

    title: str
    file: str
    quantities: tuple[Quantity, ...]
    pictures: Mapping[str, str] = field(default_factory=dict)


STUDIES = {
    "evaluation": Study(
        "Evaluation",
        "summary.json",
        _EVALUATION,
        {
            "neighbours.png": "Samples, each beside the training image that is nearest to it",
            "energies.png": "How the energies of data, proposals and samples are distributed",
        },
    ),
    "reconstruct": Study(
        "Reconstruction of held-out images",
        "errors.json",
        _RECONSTRUCT,
        {
            "reconstruct.png": "Held-out images, the starts of the chains that were "
            "found for them, and where those chains end"
        },
    ),
    "inpaint": Study(
        "Filling holes in held-out images",
        "errors.json",
        _INPAINT,
        {"inpaint.png": "Each row: the image, what is known of it, and the fillings"},
    ),
    "interpolate": Study(
        "Interpolation",
        "errors.json",
        _INTERPOLATE,
        {
            "images.png": "From one held-out image to another",
            "random.png": "From one random sample to another",
        },
    ),
    "diagnose": Study(
        "Diagnosis",
        "summary.json",
        _DIAGNOSE,
        {
            "long_chains.png": "The chains' starts, and the same chains after the length of "
            "training and after multiples of it",
            "energies.png": "Mean energy along the longest chain",
        },
    ),
}
PLANE = {
    "densities.png": "The true density and what was learned of it; below, points of each",
    "chain.gif": "The chains from their starts to their ends",
}


def rows_of(
    values: Mapping[str, Any], quantities: Iterable[Quantity]
) -> list[tuple[str, str, str]]:
    """Those quantities that the values hold, as rows of a table."""
    rows = []
    for quantity in quantities:
        value: Any = values
        for part in quantity.key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if is_finite_number(value):
            rows.append((quantity.words, quantity.note, _in_unit(value, quantity.unit)))
    return rows


def _in_unit(value: float, unit: str) -> str:
    """Long times in minutes or hours."""
    if unit == "s":
        units = ((3600, "h"), (60, "min"), (1, "s"))
        size, unit = next((size, name) for size, name in units if value >= 2 * size or size == 1)
        value /= size
    text = f"{value:,}" if isinstance(value, int) else number(value)
    return f"{text} {unit}".strip()
