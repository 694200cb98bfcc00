"""Geometry of the plots of a sweep. Positions are percentages of the drawing; heights count from the top."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orpo_ray.config.tune_schema import natural_mode
from orpo_ray.pages.axes import Mark, ticks
from orpo_ray.pages.curves import CurveChart, Series, make_curve_chart, short
from orpo_ray.sweep.record import STEP, Record, Trial
from orpo_ray.sweep.space import Dimension, Space, short_keys

FIFTHS = 5
"""Colors of trials: by the fifth of the ranking that they are in."""
MOST_MARKS = 6
"""Of an axis with choices, labels that fit."""


@dataclass(frozen=True)
class Axis:
    """One axis of the parallel coordinates."""

    at: float
    """From the left."""
    title: str
    marks: list[Mark]


@dataclass(frozen=True)
class Path:
    """A trial's line."""

    trial: str
    kind: str
    """CSS classes: its color, and `early`, `failed` or `best`."""
    path: str
    label: str


@dataclass(frozen=True)
class Parallel:
    """Parallel coordinates: an axis for each field and one for the metric, a line for each trial."""

    axes: list[Axis]
    paths: list[Path]


@dataclass(frozen=True)
class Point:
    """A trial in a map."""

    trial: str
    kind: str
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Scatter:
    """Trials over two axes."""

    x_title: str
    y_title: str
    x_marks: list[Mark]
    y_marks: list[Mark]
    points: list[Point]


def kinds_of(record: Record) -> dict[int, str]:
    """Return the CSS classes of each trial: `fifth-4` is the best fifth of those with a value."""
    ranked = [trial for trial in record.ranked() if trial.value(record.tune.metric) is not None]
    kinds = {}
    for trial in record.trials:
        if trial in ranked:
            place = len(ranked) - 1 - ranked.index(trial)
            kind = f"fifth-{place * FIFTHS // len(ranked)}"
            kind += " best" if trial is ranked[0] else ""
        else:
            kind = "fifth-none"
        kind += " failed" if trial.state == "failed" else "" if trial.state == "finished" else " early"
        kinds[trial.number] = kind
    return kinds


def label_of(trial: Trial, record: Record, space: Space) -> str:
    """Say what a trial is, in a line."""
    fields = zip(short_keys(space.keys), space.labels(trial.params), strict=True)
    value = trial.value(record.tune.metric)
    reached = "no value" if value is None else f"{record.tune.metric.removeprefix('eval/')} {value:.4f}"
    return f"{trial.name} ({', '.join(f'{name} {text}' for name, text in fields)}): {reached}, {trial.state}"


def parallel_of(record: Record, space: Space, kinds: Mapping[int, str]) -> Parallel:
    """Make the parallel coordinates. A trial without a value ends before the axis of the metric."""
    metric = record.tune.metric
    values = [value for trial in record.trials if (value := trial.value(metric)) is not None]
    low, high = _padded(min(values), max(values))
    places = [100 * place / len(space) for place in range(len(space) + 1)]
    axes = [Axis(at, name, _marks(each)) for at, name, each in zip(places, short_keys(space.keys), space, strict=False)]
    metric_marks = [Mark(100 * (1 - (tick - low) / (high - low)), short(tick)) for tick in ticks(low, high, 5)]
    axes.append(Axis(100.0, metric.removeprefix("eval/"), metric_marks))
    paths = []
    # The best last, so that they are drawn over the others.
    for trial in reversed(record.ranked()):
        points = [(at, 100 * (1 - each.unit(trial.params[each.key]))) for at, each in zip(places, space, strict=False)]
        value = trial.value(metric)
        if value is not None:
            points.append((100.0, 100 * (1 - (value - low) / (high - low))))
        drawn = "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
        paths.append(Path(trial.name, kinds[trial.number], f"M{drawn}", label_of(trial, record, space)))
    return Parallel(axes, paths)


def curves_of(record: Record, kinds: Mapping[int, str]) -> CurveChart | None:
    """Make the curves of the metric over steps, a line for each trial; the line's name is the trial's."""
    metric, series = record.tune.metric, []
    for trial in reversed(record.ranked()):
        points = [(line[STEP], line[metric]) for line in trial.history if metric in line]
        if trial.parent is not None and points:
            begun = record.trial(trial.parent).value_at(metric, trial.parent_step)
            points = [(trial.parent_step, begun), *points] if begun is not None else points
        steps, values = [step for step, _ in points], [value for _, value in points]
        series.append(Series(trial.name, kinds[trial.number], steps, values, has_dots=True))
    return make_curve_chart(metric.removeprefix("eval/"), "of the held-out pairs, over steps", series)


def map_of(record: Record, space: Space, kinds: Mapping[int, str]) -> Scatter | None:
    """Make the map of two searched fields: learning rate and beta if they are among them; None without two ranges."""
    ranges = [each for each in space if not each.choices]
    preferred = [each for end in (".learning_rate", ".beta") for each in ranges if each.key.endswith(end)]
    chosen = [*preferred, *(each for each in ranges if each not in preferred)][:2]
    if len(chosen) < 2:
        return None
    across, up = chosen
    points = [
        Point(
            trial.name,
            kinds[trial.number],
            round(100 * across.unit(trial.params[across.key]), 2),
            round(100 * (1 - up.unit(trial.params[up.key])), 2),
            label_of(trial, record, space),
        )
        for trial in reversed(record.ranked())
    ]
    x_marks = [Mark(100 - mark.at, mark.label) for mark in _marks(across)]
    x_title, y_title = short_keys([across.key, up.key])
    return Scatter(x_title, y_title, x_marks, _marks(up), points)


def front_of(record: Record, space: Space, kinds: Mapping[int, str]) -> Scatter | None:
    """Make the plot of both metrics; None without a second one. Better is always right and up."""
    metric, second = record.tune.metric, record.tune.second_metric
    if second is None:
        return None
    found = [(trial, trial.value(metric), trial.value(second)) for trial in record.trials]
    scored = [(trial, x, y) for trial, x, y in found if x is not None and y is not None]
    if not scored:
        return None
    across = _Scale([x for _, x, _ in scored], record.tune.direction == "min")
    up = _Scale([y for *_, y in scored], natural_mode(second) == "min")
    front = record.front()
    points = [
        Point(
            trial.name, kinds[trial.number] + (" front" if trial in front else ""), round(across.at(x), 2),
            round(100 - up.at(y), 2), f"{label_of(trial, record, space)}, {second.removeprefix('eval/')} {y:.4f}",
        )
        for trial, x, y in scored
    ]  # fmt: skip
    y_marks = [Mark(100 - mark.at, mark.label) for mark in up.marks()]
    titles = (metric.removeprefix("eval/"), second.removeprefix("eval/"))
    return Scatter(*titles, across.marks(), y_marks, points)


class _Scale:
    """Positions of values from 0 to 100, turned round where less is better."""

    def __init__(self, values: Sequence[float], is_turned: bool) -> None:
        self._low, self._high = _padded(min(values), max(values))
        self._is_turned = is_turned

    def at(self, value: float) -> float:
        """Return the position of a value."""
        at = 100 * (value - self._low) / (self._high - self._low)
        return 100 - at if self._is_turned else at

    def marks(self) -> list[Mark]:
        """Return the labels of the axis."""
        return [Mark(round(self.at(tick), 2), short(tick)) for tick in ticks(self._low, self._high, 5)]


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.05 * max(abs(high), 1e-3)
    return low - room, high + room


def _marks(dimension: Dimension) -> list[Mark]:
    """Return the labels of a field's axis, from the top."""
    if dimension.choices:
        every = math.ceil(len(dimension.choices) / MOST_MARKS)
        shown = list(zip(dimension.choices, dimension.labels, strict=True))[::every]
        return [Mark(100 * (1 - dimension.unit(value)), label) for value, label in shown]
    if not dimension.log:
        values = ticks(dimension.low, dimension.high, 4, whole=dimension.is_whole)
    else:
        values = _log_ticks(dimension.low, dimension.high)
    return [Mark(100 * (1 - dimension.unit(value)), short(value)) for value in values]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round values of a logarithmic axis: powers of ten, and 2 and 5 times those if there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) >= 3:
            return found
    return found if len(found) >= 2 else [low, high]
