"""What a step's losses are divided by: pairs, and the NLL tokens of objectives that average over tokens."""

from __future__ import annotations

import pytest
import torch

from orpo_ray.objective.base import Normaliser, Objective
from orpo_ray.objective.cpo import CPO
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.simpo import SimPO
from orpo_ray.objective.step_planner import StepPlanner
from support.encoded_pairs import make

CPU = torch.device("cpu")
DUMMY = make([1], [2], [3], -1)


@pytest.mark.parametrize(
    ("objective", "nll_tokens", "targets"),
    [
        (ORPO(), None, 3 + 5),
        (ORPO(nll="prompt+response"), 3.0 + 2, 2 + 3 + 5),
        (CPO(), 3.0, 3 + 5),
        (SimPO(), None, 3 + 5),
    ],
    ids=str,
)
def test_the_objective_decides_targets_and_normaliser(
    objective: Objective, nll_tokens: float | None, targets: int
) -> None:
    """Two pairs: prompts of 2 tokens, of which the first is never a target; answers of 1 + 2 and of 4 + 1 tokens."""
    pairs = [make([1, 1], [2], [3, 3, 3, 3], 0), make([1, 1], [2, 2], [3], 1)]
    planner = StepPlanner(objective, 100, "shared_prefix", DUMMY, DUMMY, CPU)
    plan = planner.plan(pairs, num_bad=3)
    assert plan.normaliser == Normaliser(2.0, nll_tokens)
    assert (plan.pairs, plan.bad) == (2, 3)
    assert sum(len(batch.target_ids) for batch in plan.batches) == targets
