"""What of ``metrics.jsonl`` is drawn over the steps, and how it is called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """One quantity, of one or two kinds of events.

    Attributes:
        title: the quantity in words.
        note: unit and direction.
        names: name in ``metrics.jsonl`` → what the line is called.
        log: whether it spans orders of magnitude.
    """

    title: str
    note: str
    names: Mapping[str, str]
    log: bool = False


CURVES = (
    Curve(
        "Distance to the training data",
        "Fréchet distance in features, no unit; less is better",
        {"fd_langevin": "after Langevin", "fd_flow": "before"},
        log=True,
    ),
    Curve(
        "Likelihood of held-out data under the flow",
        "bits per dimension; less is better",
        {"bits_per_dim": "the first held-out events, as many as samples are drawn"},
    ),
    Curve(
        "Loss of the flow",
        "negative log-likelihood in nats per element, of data in pre-training and of samples "
        "after it; less is better",
        {"flow_nll": "a batch"},
    ),
    Curve(
        "Moment gap between data and samples",
        "norms of the differences of mean and covariance, in units of the data; less is better",
        {"moment_gap": "samples since the last point"},
    ),
    Curve(
        "Mean energy",
        "no unit; the two lines belong close together",
        {"energy_data": "data", "energy_samples": "samples"},
    ),
    Curve(
        "Way of a chain from its start to its end",
        "root mean square per element, in units of the data: what is left for the chains to do",
        {"langevin_distance": "a batch"},
    ),
    Curve(
        "Norms of the gradients",
        "before any clip, no unit; steady is good",
        {"flow_grad_norm": "flow", "energy_grad_norm": "energy"},
        log=True,
    ),
)


def is_finite_number(value: object) -> bool:
    """Whether a value of a JSON file can be drawn or written as a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def points_of(curve: Curve, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """(step, value) of every line of the curve that has any, by what the line is called; on a
    logarithmic axis without values that are not above 0."""
    found = {}
    for name, label in curve.names.items():
        points = [(m["step"], m[name]) for m in metrics if is_finite_number(m.get(name))]
        if curve.log:
            points = [(step, value) for step, value in points if value > 0]
        if points:
            found[label] = points
    return found
