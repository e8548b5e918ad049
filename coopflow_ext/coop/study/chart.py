"""A line chart as SVG that can be read on a phone and takes its colours from the page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

from coopflow_ext.coop.curves import Curve, Points

# About the pixels of a phone, so that text there has the size that stands here.
WIDTH, HEIGHT = 400, 230
FONT = 13
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 40
_MOST_POINTS = 300
# Classes of the lines in the page's style, which also names their colours.
LINES = ("line-a", "line-b")


def line_chart(
    curve: Curve, lines: Mapping[str, Points], references: Mapping[str, float] | None = None
) -> str:
    """An ``<svg>`` of the lines over the steps, with horizontal lines at the references.

    A line of more than 300 points is drawn through the means of neighbours.

    Args:
        curve: what is drawn.
        lines: (step, value) by what the line is called; at least one, none of them empty.
        references: values to compare with, by name; above 0 where the axis is logarithmic.
    """
    references = references or {}
    thinned = {label: _thin(points) for label, points in lines.items()}
    values = [y for points in thinned.values() for _, y in points] + [*references.values()]
    last = max(max(step for step, _ in points) for points in lines.values())
    x_ticks = [tick for tick in nice_ticks(0, max(last, 1)) if tick == int(tick)]
    low, high = _padded(min(values), max(values), log=curve.log)
    across = _Axis(0, max(last, 1), _LEFT, WIDTH - _RIGHT)
    up = _Axis(low, high, HEIGHT - _BOTTOM, _TOP, curve.log)
    y_ticks = log_ticks(low, high) if curve.log else nice_ticks(low, high)
    parts = [_grid(across, up, x_ticks, y_ticks)]
    for value in references.values():
        y = up(value)
        parts.append(f"<line class='reference' x1='{_LEFT}' x2='{WIDTH - _RIGHT}' {_y(y)}/>")
    for style, points in zip(LINES, thinned.values(), strict=False):
        parts.append(_line(style, [(across(x), up(y)) for x, y in points]))
    label = html.escape(f"{curve.title}, {curve.note}: {_in_words(lines, references)}")
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' font-size='{FONT}' role='img' "
        f"aria-label='{label}'>{''.join(parts)}</svg>"
    )


class _Axis:
    """From values to places in the picture."""

    def __init__(
        self, low: float, high: float, start: float, end: float, log: bool = False
    ) -> None:
        self.scale = math.log10 if log else float
        self.low, self.high = self.scale(low), self.scale(high)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (self.scale(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def number(value: float) -> str:
    """Three significant digits, and all digits before the point, for readers."""
    rounded = float(f"{value:.3g}")
    if rounded == 0:
        return "0"
    if not 1e-4 <= abs(rounded) < 1e7:
        return f"{value:.3g}".replace("-", "−")
    digits = 2 - math.floor(math.log10(abs(rounded)))
    return f"{value:,.{max(0, digits)}f}".replace("-", "−")


def _short(value: float) -> str:
    """For a tick, which is a round number."""
    if value == 0:
        return "0"
    size = abs(value)
    for factor, sign in ((1e6, "M"), (1e3, "k")):
        if 1e4 <= size < 1e10 and size >= factor:
            return f"{value / factor:g}{sign}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers within [low, high], low < high."""
    most = (high - low) / 3
    unit = 10.0 ** math.floor(math.log10(most))
    step = max(m * unit for m in (1, 2, 5) if m * unit <= most * 1.001)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """At most eight round numbers within [low, high], 0 < low < high, for a logarithmic axis."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [e for e in exponents if low <= 10.0**e <= high]
    if len(inside) >= 3:
        return [10.0**e for e in inside[:: -(-len(inside) // 6)]]
    ticks = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) >= 2 else nice_ticks(low, high)


def _padded(low: float, high: float, *, log: bool) -> tuple[float, float]:
    """Some room above and below, also around values that are all the same."""
    if log:
        factor = (high / low) ** 0.05 if high > low else 2.0
        return low / factor, high * factor
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _grid(across: _Axis, up: _Axis, x_ticks: list[float], y_ticks: list[float]) -> str:
    bottom = HEIGHT - _BOTTOM
    parts = []
    for tick in y_ticks:
        y = up(tick)
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{WIDTH - _RIGHT}' {_y(y)}/>")
        parts.append(
            f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{_short(tick)}</text>"
        )
    for tick in x_ticks:
        x = across(tick)
        parts.append(
            f"<text x='{min(x, WIDTH - 18):.1f}' y='{bottom + 17}' text-anchor='middle'>"
            f"{_short(tick)}</text>"
        )
    parts.append(
        f"<text x='{(_LEFT + WIDTH - _RIGHT) / 2}' y='{HEIGHT - 6}' text-anchor='middle'>"
        "step</text>"
    )
    return "".join(parts)


def _y(y: float) -> str:
    return f"y1='{y:.1f}' y2='{y:.1f}'"


def _line(style: str, places: list[tuple[float, float]]) -> str:
    if len(places) == 1:
        (x, y), *_ = places
        return f"<circle class='{style}' cx='{x:.1f}' cy='{y:.1f}' r='3.5'/>"
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f"<polyline class='{style}' points='{points}'/>"


def _thin(points: Points) -> list[tuple[float, float]]:
    """Means of neighbours, so that no more than 300 remain; the last point stays as it is."""
    size = -(-len(points) // _MOST_POINTS)
    if size == 1:
        return [(float(x), y) for x, y in points]
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [*means[:-1], points[-1]]


def _in_words(lines: Mapping[str, Points], references: Mapping[str, float]) -> str:
    """For those who do not see the picture."""
    said = []
    for label, points in lines.items():
        (first, begin), (last, end) = points[0], points[-1]
        said.append(
            f"{label} {number(end)} at step {last:,}"
            if len(points) == 1
            else f"{label} from {number(begin)} at step {first:,} to {number(end)} at step {last:,}"
        )
    said += [f"{label} {number(value)}" for label, value in references.items()]
    return "; ".join(said)
