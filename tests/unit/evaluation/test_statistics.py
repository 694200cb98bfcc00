"""Confidence intervals and paired tests keep what they promise, on planted data."""

from __future__ import annotations

import numpy as np
import pytest

from orpo_ray.evaluation.statistics import (
    Estimate,
    compare,
    mcnemar_test,
    mean_estimate,
    mean_estimates,
    sign_flip_test,
)

DRAWS = 1000


def test_intervals_contain_the_truth_in_95_of_100_draws() -> None:
    """An accuracy of 0.8, a grounding gap of 0.3 and skewed margins with mean 1, over 200 pairs."""
    rng = np.random.default_rng(7)
    truths, hits, together = (0.8, 0.3, 1.0), np.zeros(3), 50
    for call in range(DRAWS // together):  # many draws in one call, which is the fastest
        correct = rng.random((together, 200)) < 0.8
        exchanged = correct & (rng.random((together, 200)) < 0.625)  # 0.8 x 0.625 = 0.5 right with other images
        figures = (correct, correct.astype(float) - exchanged, rng.gamma(4, 0.25, (together, 200)))
        found = mean_estimates([draw for figure in figures for draw in figure], call, 599)
        for place, truth in enumerate(truths):
            hits[place] += sum(each.contains(truth) for each in found[place * together : (place + 1) * together])
    assert ((hits / DRAWS >= 0.93) & (hits / DRAWS <= 0.97)).all(), hits / DRAWS


def test_paired_tests_raise_a_false_alarm_in_5_of_100_draws() -> None:
    """Two models that are right equally often, whose margins on the same pairs correlate."""
    rng = np.random.default_rng(11)
    alarms = np.zeros(2)
    for draw in range(DRAWS):
        one, two = rng.normal(size=4000) + rng.normal(size=(2, 4000))
        better, worse = int(((one > 0) & (two <= 0)).sum()), int(((one <= 0) & (two > 0)).sum())
        margins = (one - two)[:60]
        alarms += [mcnemar_test(better, worse) < 0.05, sign_flip_test(margins, draw, 399) < 0.05]
    assert ((alarms / DRAWS >= 0.035) & (alarms / DRAWS <= 0.065)).all(), alarms / DRAWS


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(3)
    one, two = rng.random(400) < 0.85, rng.random(400) < 0.70
    found = compare(one, one * 2.0, two, two * 1.0)
    assert found.accuracy.value == pytest.approx(one.mean() - two.mean())
    assert found.accuracy.low > 0
    assert (found.better, found.worse) == (int((one & ~two).sum()), int((two & ~one).sum()))
    assert found.p_accuracy < 1e-4
    assert found.p_margin < 1e-3


def test_mcnemar_is_the_binomial_of_the_pairs_that_differ() -> None:
    """9 pairs right only with the first, 1 only with the second: p = 2 (1 + 10) / 2^10."""
    one = np.array([True] * 9 + [False] + [True] * 50)
    two = np.array([False] * 9 + [True] + [True] * 50)
    assert compare(one, one * 1.0, two, two * 1.0).p_accuracy == pytest.approx(2 * 11 / 1024)


def test_equal_values_are_not_certain() -> None:
    """All of 30 right: the lower bound solves p^30 = 0.025."""
    all_right = mean_estimate(np.ones(30, bool))
    assert all_right.value == all_right.high == 1
    assert all_right.low == pytest.approx(0.025 ** (1 / 30))
    none_right = mean_estimate(np.zeros(30, bool))
    assert none_right.high == pytest.approx(1 - 0.025 ** (1 / 30))
    no_gap = mean_estimate(np.zeros(30))
    assert (no_gap.low, no_gap.high) == (-none_right.high, none_right.high)


def test_a_single_pair_has_no_interval_and_identical_models_no_difference() -> None:
    assert mean_estimate(np.array([0.25])) == Estimate(0.25, 0.25, 0.25, 1)
    same = np.array([True, False] * 10)
    found = compare(same, same * 1.0, same, same * 1.0)
    assert (found.p_accuracy, found.p_margin) == (1.0, 1.0)
    assert sign_flip_test(np.array([1.0])) == 1.0
