"""Confidence intervals of averages over pairs, and tests of two models on the same pairs.

Legend: n pairs, k figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2_000
BCA_PAIRS = 1_000
VALUES_AT_ONCE = 2**23  # of resamples in memory, 64 MiB


@dataclass(frozen=True)
class Estimate:
    """An average and its 95 % confidence interval."""

    value: float
    low: float
    high: float
    pairs: int

    def contains(self, value: float) -> bool:
        """Whether the interval contains a value."""
        return self.low <= value <= self.high

    def as_json(self) -> dict[str, float]:
        """The fields, for `--json`."""
        return {"value": self.value, "low": self.low, "high": self.high, "pairs": self.pairs}


def mean_estimates(figures: Sequence[np.ndarray], seed: int = 0, resamples: int = RESAMPLES) -> list[Estimate]:
    """Estimate the averages of several figures of the same pairs by the bootstrap over pairs.

    Where all values are equal, every resample is too, and the bootstrap would claim certainty. Values that can only be
    0 or 1, or -1, 0 or 1, then get the exact binomial interval of an event that always or never occurred.

    Args:
        figures: k arrays [n] of finite values; booleans are fractions.
        seed: of the resamples.
        resamples: their number.

    Returns:
        k estimates. A single pair has no interval: it is the value itself.
    """
    n = len(figures[0])
    estimates = [_of_equal_values(figure) for figure in figures]
    varied = [place for place, figure in enumerate(figures) if n > 1 and np.ptp(figure.astype(np.float64)) > 0]
    if not varied:
        return estimates
    values = np.stack([figures[place].astype(np.float64) for place in varied])
    found = stats.bootstrap(
        (values,),
        np.mean,
        axis=-1,
        n_resamples=resamples,
        batch=max(1, VALUES_AT_ONCE // values.size),
        confidence_level=CONFIDENCE,
        # The correction for skew takes n^2 operations, and matters for few pairs only.
        method="BCa" if n <= BCA_PAIRS else "percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    for place, mean, low, high in zip(varied, values.mean(1).tolist(), found.low, found.high, strict=True):
        estimates[place] = Estimate(mean, float(low), float(high), n)
    return estimates


def mean_estimate(figure: np.ndarray, seed: int = 0) -> Estimate:
    """Estimate the average of one figure; see `mean_estimates`."""
    return mean_estimates([figure], seed)[0]


def _of_equal_values(figure: np.ndarray) -> Estimate:
    """Estimate from the first value, as if all were equal to it."""
    n, value = len(figure), float(figure[0])
    if n < 2 or value not in (-1.0, 0.0, 1.0):
        return Estimate(value, value, value, n)
    rare = float(stats.binomtest(0, n).proportion_ci(CONFIDENCE, method="exact").high)
    lowest = 0.0 if figure.dtype == np.bool_ else -1.0
    return Estimate(value, max(lowest, value - rare), min(1.0, value + rare), n)


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same pairs."""

    accuracy: Estimate
    """Difference of the accuracies."""
    p_accuracy: float
    """Of McNemar's exact test: that the models are right equally often."""
    margin: Estimate
    """Mean difference of the margins."""
    p_margin: float
    """Of a permutation test: that the margins differ as often in favor of one model as of the other."""
    better: int
    """Pairs that only the first model gets right."""
    worse: int
    """Pairs that only the second model gets right."""

    def as_json(self) -> dict[str, object]:
        """The fields, for `--json`."""
        return {
            "accuracy": self.accuracy.as_json(),
            "p_accuracy": self.p_accuracy,
            "margin": self.margin.as_json(),
            "p_margin": self.p_margin,
            "better": self.better,
            "worse": self.worse,
        }


def compare(
    correct: np.ndarray, margins: np.ndarray, other_correct: np.ndarray, other_margins: np.ndarray, seed: int = 0
) -> Comparison:
    """Compare two models on the same n pairs.

    Args:
        correct: bool [n], of the first model.
        margins: [n], in the same unit as `other_margins`.
        other_correct: bool [n], of the second model.
        other_margins: [n].
        seed: of resamples and permutations.
    """
    better, worse = int((correct & ~other_correct).sum()), int((other_correct & ~correct).sum())
    differences = [correct.astype(np.float64) - other_correct, np.asarray(margins - other_margins, np.float64)]
    accuracy, margin = mean_estimates(differences, seed)
    p_margin = sign_flip_test(differences[1], seed)
    return Comparison(accuracy, mcnemar_test(better, worse), margin, p_margin, better, worse)


def mcnemar_test(better: int, worse: int) -> float:
    """Return the p-value that two models are right equally often, by McNemar's exact test.

    Args:
        better: pairs that only the first model gets right.
        worse: pairs that only the second model gets right.
    """
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def sign_flip_test(differences: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Return the two-sided p-value, by permutation, that paired differences are symmetric about 0."""
    if len(differences) < 2 or not differences.any():
        return 1.0
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        batch=max(1, VALUES_AT_ONCE // len(differences)),
        rng=np.random.default_rng(seed),
        axis=-1,
        vectorized=True,
    )
    return float(found.pvalue)
