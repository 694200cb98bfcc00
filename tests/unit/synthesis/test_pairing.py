"""The best candidate against the worst, or why there is no pair."""

from __future__ import annotations

import math

import pytest

from orpo_ray.errors import RowError
from orpo_ray.synthesis.candidates import Candidate
from orpo_ray.synthesis.pairing import best_and_worst


def scored(*scores: float | None) -> list[Candidate]:
    return [Candidate(f"t{number}", score=score) for number, score in enumerate(scores)]


def test_the_first_of_equal_scores_is_taken() -> None:
    best, worst = best_and_worst(scored(0.5, 2.0, -1.0, 2.0, -1.0), 0.0)
    assert (best.text, worst.text) == ("t1", "t2")


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ((1.0,), "one_answer"),
        ((), "one_answer"),
        ((1.0, None), "no_score"),
        ((1.0, math.nan, math.inf), "no_score"),
        ((1.0, 1.0), "equal_scores"),
        ((1.0, 0.6), "small_margin"),
    ],
)
def test_candidates_that_make_no_pair(scores: tuple[float | None, ...], reason: str) -> None:
    with pytest.raises(RowError) as found:
        best_and_worst(scored(*scores), 0.5)
    assert found.value.reason == reason


def test_the_least_margin_is_enough() -> None:
    assert best_and_worst(scored(1.0, 0.5), 0.5)
