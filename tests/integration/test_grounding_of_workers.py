"""Scores of several workers: all of them get every pair, and another worker may score it with exchanged images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orpo_ray.data.balance import Packing
from orpo_ray.data.packing import PairBatch
from orpo_ray.evaluation.evaluator import Scores, score, with_pass
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.step_planner import StepPlanner
from support.encoded_pairs import make
from support.worker_group import worker_group

# Of each rank: sample index -> whether the chosen answer is preferred.
SEEN = [{0: True, 1: True, 4: False}, {2: True, 3: True}]
EXCHANGED = [{2: False, 4: False}, {0: True, 1: False}]  # pair 3 had no images to exchange


def scores_of(preferred: dict[int, bool]) -> Scores:
    dummy = make([1], [2], [3], -1)
    planner = StepPlanner(ORPO(0.5), Packing(100, "concatenated"), dummy, dummy, torch.device("cpu"))

    def forward(batch: PairBatch) -> PairLogps:
        ones = torch.ones(len(batch.sample_indices))
        chosen = torch.tensor([-1.0 if preferred.get(each) else -3.0 for each in batch.sample_indices])
        return PairLogps(chosen, -2 * ones, ones, ones, ones, ones)

    return score(forward, [planner.share([make([1, 2], [3], [4], each) for each in preferred])], planner)


def grounding(rank: int, size: int) -> tuple[dict[str, float], list[Any]]:
    found = with_pass(scores_of(SEEN[rank]), scores_of(EXCHANGED[rank]), "exchanged")
    return found.metrics, found.pairs.select(["sample_index", "correct", "exchanged/correct"]).to_pylist()


def test_a_pair_counts_whichever_worker_scores_it() -> None:
    """Of pairs 0, 1, 2 and 4, three are right with their own images and one with others."""
    expected = {"rewards/accuracies_exchanged": 1 / 4, "grounding_gap": 2 / 4, "grounding_pairs": 4}
    rows = [(0, True, True), (1, True, False), (2, True, False), (3, True, None), (4, False, False)]
    for metrics, pairs in worker_group(2).run(grounding):
        assert {name: metrics[name] for name in expected} == pytest.approx(expected)
        assert metrics["rewards/accuracies"] == 4 / 5
        assert [tuple(row.values()) for row in pairs] == rows
