"""Geometry of line charts over steps.

Positions are percentages of the drawing, so that it can be stretched without its text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orpo_ray.pages.axes import Mark, ticks

POINTS = 600
"""Of a line; a longer one is averaged over as many groups of steps."""
DOTS = 60
"""Most points that are drawn as dots."""
SMOOTHING = 40
"""A noisy line is also drawn averaged over a window of a 40th of its points."""


@dataclass(frozen=True)
class Series:
    """The values of a metric over steps."""

    name: str
    kind: str
    """CSS class of its color."""
    steps: Sequence[float]
    values: Sequence[float]
    """Finite values."""
    is_noisy: bool = False
    """Whether to draw a running average too."""
    has_dots: bool = False
    """Whether to mark each point, if they are few."""


@dataclass(frozen=True)
class Line:
    """A drawn series."""

    name: str
    kind: str
    path: str
    """SVG path."""
    smooth: str
    """SVG path of the running average; empty without one."""
    dots: list[tuple[float, float]]
    """(x, y) of each point of a short series, from the top left."""
    last: float


@dataclass(frozen=True)
class CurveChart:
    """A chart of series over steps."""

    title: str
    note: str
    """What the values are."""
    lines: list[Line]
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    zero: float | None
    """Position of the reference line, from the top; None without one."""
    summary: str
    """What a screen reader says."""


def make_curve_chart(
    title: str, note: str, series: Sequence[Series], reference: float | None = None
) -> CurveChart | None:
    """Make a chart; None if no series has a value.

    Args:
        title: of the chart.
        note: what the values are.
        series: what to draw. Values that are far outside the others leave the chart at its edge.
        reference: a value to draw a line at, such as chance.
    """
    series = [each for each in series if len(each.steps)]
    if not series:
        return None
    low, high = _range([np.asarray(each.values, float) for each in series], reference)
    last_step = max(1.0, max(max(each.steps) for each in series))
    first_step = min(min(each.steps) for each in series)
    first_step = 0.0 if first_step <= 0.05 * last_step else min(first_step, last_step - 1)

    def x(steps: np.ndarray) -> np.ndarray:
        return 100 * (steps - first_step) / max(1e-9, last_step - first_step)

    def y(values: np.ndarray) -> np.ndarray:
        return np.clip(100 - 100 * (values - low) / (high - low), -2, 102)

    lines = []
    for each in series:
        steps, values = _averaged(np.asarray(each.steps, float), np.asarray(each.values, float))
        points = list(zip(x(steps).round(2).tolist(), y(values).round(2).tolist(), strict=True))
        smooth = ""
        if each.is_noisy and len(values) >= SMOOTHING // 2:
            smooth = _path(list(zip(x(steps).round(2).tolist(), y(_smoothed(values)).round(2).tolist(), strict=True)))
        dots = points if each.has_dots and len(points) <= DOTS else []
        lines.append(Line(each.name, each.kind, _path(points), smooth, dots, float(each.values[-1])))
    marks = [Mark(round(float(y(np.array(tick))), 3), short(tick)) for tick in ticks(low, high, 4)]
    drawn = ", ".join(f"{line.name} ends at {short(line.last)}" for line in lines)
    return CurveChart(
        title=title,
        note=note,
        lines=lines,
        x_ticks=[
            Mark(round(float(x(np.array(tick))), 3), f"{tick:,.0f}") for tick in _whole_ticks(first_step, last_step)
        ],
        y_ticks=marks,
        zero=None if reference is None else round(float(y(np.array(reference))), 3),
        summary=f"{title} over steps {first_step:,.0f} to {last_step:,.0f}: {drawn}.",
    )


def short(value: float) -> str:
    """Format a value of an axis: 0.25, 12, 1.5e-05."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+").replace(".0e", "e")


def _range(all_values: Sequence[np.ndarray], reference: float | None) -> tuple[float, float]:
    """Return the range of values to draw, without the outermost half per cent, such as one loss of thousands."""
    joined = np.concatenate(all_values)
    low, high = np.percentile(joined, [0.5, 99.5]).tolist() if len(joined) > 200 else (joined.min(), joined.max())
    if reference is not None:
        low, high = min(low, reference), max(high, reference)
    if low >= 0 and low < 0.3 * high:
        low = 0.0
    if high <= 0 and high > 0.3 * low:
        high = 0.0
    room = 0.04 * (high - low) or max(abs(high), 1.0) * 0.1
    return float(low - (room if low else 0)), float(high + (room if high else 0))


def _averaged(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(steps) <= POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), POINTS + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(steps, edges[:-1]) / counts, np.add.reduceat(values, edges[:-1]) / counts


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Average over a centered window, which is shorter at both ends."""
    half = max(1, len(values) // SMOOTHING)
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(0, places - half), np.minimum(len(values), places + half + 1)
    smooth: np.ndarray = (total[last] - total[first]) / (last - first)
    return smooth


def _path(points: Sequence[tuple[float, float]]) -> str:
    if len(points) == 1:
        points = [points[0], (points[0][0] + 0.5, points[0][1])]
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _whole_ticks(low: float, high: float) -> list[float]:
    found = ticks(low, high, 5, whole=True)
    return found if len(found) > 1 else [math.floor(low), math.ceil(high)]
