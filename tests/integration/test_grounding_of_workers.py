"""The grounding metrics over workers: a pair with exchanged images may be scored by another worker."""

from __future__ import annotations

import pytest
import torch

from orpo_ray.evaluation.evaluator import Scores, grounding_metrics
from support.worker_group import worker_group

# Of each rank: sample index -> whether the chosen answer was preferred.
SEEN = [{0: True, 1: True, 4: False}, {2: True, 3: True}]
EXCHANGED = [{2: False, 4: False}, {0: True, 1: False}]  # pair 3 had no images to exchange


def grounding(rank: int, size: int) -> dict[str, float]:
    return grounding_metrics(Scores({}, SEEN[rank]), Scores({}, EXCHANGED[rank]), torch.device("cpu"))


def test_a_pair_counts_whichever_worker_scores_it() -> None:
    """Of pairs 0, 1, 2 and 4, three are right with their own images and one with others."""
    expected = {"rewards/accuracies_exchanged": 1 / 4, "grounding_gap": 2 / 4, "grounding_pairs": 4}
    assert worker_group(2).run(grounding) == [pytest.approx(expected)] * 2
