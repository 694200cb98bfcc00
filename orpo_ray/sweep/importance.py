"""How much each field of a search matters for the metric, and how sure that is.

The importance of a field is the share of the metric's variance that the field alone explains: how much better a smooth
curve over the field (or the mean of each choice) predicts a trial that it has not seen than the mean does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orpo_ray.sweep.record import Record
from orpo_ray.sweep.space import Dimension, Space

LEAST_TRIALS = 5
RESAMPLES = 400
WIDTHS = (0.08, 0.15, 0.3)
"""Of the curve's kernel, as fractions of the range; the one that predicts best is taken."""
INTERVAL = (5, 95)
CHANCE = 95
"""Percentile of what a field without effect would seem to explain."""


@dataclass(frozen=True)
class Importance:
    """Of one field."""

    key: str
    share: float
    """Of the metric's variance that the field alone explains, 0 to 1."""
    low: float
    high: float
    """90 % interval, bootstrapped over trials."""
    chance: float
    """What a field without any effect would reach in one of 20 searches such as this one."""

    @property
    def is_clear(self) -> bool:
        """Whether the field explains more than chance would."""
        return self.share > self.chance


def importances(record: Record, space: Space) -> tuple[list[Importance], int, int]:
    """Return the importance of each field, the greatest first, the number of trials, and the step they are compared at.

    Trials are compared at the last step that all of them were evaluated at, since a value after more steps is no
    like-for-like. Without enough trials, the list is empty.
    """
    metric = record.tune.metric
    evaluated = [trial for trial in record.trials if trial.parent is None and trial.value(metric) is not None]
    steps = [{int(line["step"]) for line in trial.history if metric in line} for trial in evaluated]
    common = set.intersection(*steps) if steps else set()
    if len(evaluated) < LEAST_TRIALS or not common:
        return [], len(evaluated), 0
    step = max(common)
    values = np.array([trial.value_at(metric, step) for trial in evaluated], float)
    found = []
    for place, dimension in enumerate(space):
        at = np.array([dimension.unit(trial.params[dimension.key]) for trial in evaluated])
        found.append(_importance(dimension, at, values, np.random.default_rng([record.tune.seed, place])))
    return sorted(found, key=lambda each: -each.share), len(evaluated), step


def _importance(dimension: Dimension, at: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> Importance:
    width, share = _best_width(dimension, at, values)
    drawn = rng.integers(len(values), size=(RESAMPLES, len(values)))
    spread = [explained(at[rows], values[rows], rows, width) for rows in drawn if np.ptp(values[rows]) > 0]
    shuffled = [rng.permutation(values) for _ in range(RESAMPLES // 2)]
    chance = [_best_width(dimension, at, each)[1] for each in shuffled]
    low, high = np.percentile(spread, INTERVAL) if spread else (0.0, 1.0)
    return Importance(
        dimension.key,
        share,
        float(min(low, share)),
        float(max(high, share)),
        float(np.percentile(chance, CHANCE)),
    )


def _best_width(dimension: Dimension, at: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Return the width of the kernel that predicts best, and what is explained with it; 0 compares equal values."""
    rows = np.arange(len(values))
    widths: Sequence[float] = (0.0,) if dimension.choices else WIDTHS
    share, width = max((explained(at, values, rows, width), width) for width in widths)
    return width, share


def explained(at: np.ndarray, values: np.ndarray, rows: np.ndarray, width: float) -> float:
    """Return the share of the variance that is explained by a curve that has not seen the trial it predicts.

    Args:
        at: position of each trial in the field's range, 0 to 1.
        values: of the metric.
        rows: the trial that each value is of; a trial does not predict itself, however often it was drawn.
        width: of the Gaussian kernel; 0 gives weight to equal positions only.
    """
    distance = at[:, None] - at[None, :]
    weights = np.exp(-0.5 * (distance / width) ** 2) if width else (np.abs(distance) < 1e-9).astype(float)
    others = rows[:, None] != rows[None, :]
    rest = others.sum(1)
    if not rest.all():
        return 0.0
    mean = (others * values).sum(1) / rest
    weights = weights * others
    # With a weight for the mean, so that a trial far from all others is predicted by the mean.
    prior = 0.1
    curve = (weights @ values + prior * mean) / (weights.sum(1) + prior)
    total = ((values - mean) ** 2).sum()
    return float(max(0.0, 1 - ((values - curve) ** 2).sum() / total)) if total > 0 else 0.0
