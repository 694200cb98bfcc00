"""Make a pair of scored candidates: the best against the worst."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orpo_ray.errors import RowError
from orpo_ray.synthesis.candidates import Candidate


def best_and_worst(candidates: Sequence[Candidate], min_margin: float) -> tuple[Candidate, Candidate]:
    """Return the candidates with the highest and the lowest score; of equal scores, the first.

    Args:
        candidates: with scores, each text once.
        min_margin: least difference between the two scores.

    Raises:
        RowError: the candidates make no pair; the reason says why.
    """
    if len(candidates) < 2:
        raise RowError("one_answer", f"a pair needs two different answers, found {len(candidates)}")
    scored = [(each.score, each) for each in candidates if each.score is not None and math.isfinite(each.score)]
    if len(scored) < 2:
        raise RowError("no_score", f"{len(candidates) - len(scored)} of {len(candidates)} answers have no finite score")
    best, worst = max(scored, key=lambda item: item[0]), min(scored, key=lambda item: item[0])
    margin = best[0] - worst[0]
    if margin == 0:
        raise RowError("equal_scores", f"all {len(scored)} answers have the same score")
    if margin < min_margin:
        raise RowError("small_margin", f"the scores differ by {margin:.4g}; synthesize.min_margin is {min_margin:g}")
    return best[1], worst[1]
