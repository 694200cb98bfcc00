"""Plans of a step: what its losses are divided by, and how the workers' plans match without communication."""

from __future__ import annotations

import pytest
import torch

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.balance import Layout, Packing
from orpo_ray.objective.base import Normaliser, Objective
from orpo_ray.objective.cpo import CPO
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.simpo import SimPO
from orpo_ray.objective.step_planner import StepPlanner
from support.encoded_pairs import IMAGE, make

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
    planner = StepPlanner(objective, Packing(100, "shared_prefix"), DUMMY, DUMMY, CPU)
    bad = BadRow(6, "e", "pairs.jsonl:line 6", "too_long", "120 tokens")
    plan = planner.plan(planner.share(pairs, [bad], step=2))
    assert plan.normaliser == Normaliser(2.0, nll_tokens)
    assert (plan.step, plan.pairs, plan.bad) == (2, 2, [bad])
    assert sum(len(batch.target_ids) for batch in plan.batches) == targets


@pytest.mark.parametrize("num_pairs", [0, 1, 2, 9])
@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_all_workers_arrive_at_matching_plans(num_pairs: int, layout: Layout) -> None:
    """Three workers, few pairs with an image: dummy pairs fill up."""
    prompts = [[IMAGE, 1] if index % 4 == 0 else [1, 2, 3] for index in range(num_pairs)]
    pairs = [make(prompt, [2] * (1 + index), [3, 4], index) for index, prompt in enumerate(prompts)]
    image_dummy = make([IMAGE, 1], [2], [3], -1)
    planner = StepPlanner(CPO(), Packing(30, layout), DUMMY, image_dummy, CPU)
    plans = [planner.plan(planner.share(pairs, rank=rank, workers=3)) for rank in range(3)]
    assert len({(plan.pairs, plan.normaliser) for plan in plans}) == 1
    assert plans[0].normaliser == Normaliser(float(num_pairs), float(sum(len(pair.chosen_ids) for pair in pairs)))
    trained = [
        index
        for plan in plans
        for batch in plan.batches
        for index in batch.sample_indices
        if index != DUMMY.sample_index
    ]
    assert sorted(trained) == list(range(num_pairs))
    for together in zip(*(plan.batches for plan in plans), strict=True):
        assert all(batch.images for batch in together)
