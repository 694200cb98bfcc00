"""Pairs that share prompts and images, packed as trees: results and gradients are those of separate pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.data.balance import Packing, PairSize
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import build_batch
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.cover import cover
from support.pairs_by_hand import CROSS, assert_equal, gradients, make_row, run, run_as, tiny_pair_model
from support.trees_by_hand import all_kinds, four_answers, several_questions

SHARING = [family for family in TINY_FAMILIES if family not in CROSS]
ROWS = [four_answers, several_questions, all_kinds]
MODES: list[tuple[bool, str]] = [(False, "none"), (True, "none"), (False, "full"), (True, "selective")]
OBJECTIVE = ORPO(0.5, image_beta=0.7, anchor=1.5)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("family", "row", "mode"), cover(SHARING, ROWS, MODES))
def test_equal_separate_pairs(
    family: str, row: Callable[[str], list[EncodedPair]], mode: tuple[bool, Checkpointing]
) -> None:
    """In the same layout, and in the concatenated one. Full fine-tuning and LoRA, with recomputation and without."""
    model, pairs = tiny_pair_model(family, *mode), row(family)
    nll = "response" if row is four_answers else "prompt+response"
    trees, packed, padded = (
        run(model, pairs, layout, nll, objective=OBJECTIVE, shares=shares)
        for layout, shares in (
            ("shared_prefix", model.family.shares), ("shared_prefix", "nothing"), ("concatenated", "nothing"),
        )
    )  # fmt: skip
    assert_equal(trees, packed)
    assert_equal(trees, padded)


@pytest.mark.parametrize("family", ["paligemma", "gemma3", "smolvlm"])
def test_tokens_and_images_of_a_tree_are_there_once(family: str) -> None:
    model = tiny_pair_model(family)
    shares = model.family.shares
    for row in ROWS:
        pairs = row(family)
        batch = build_batch(pairs, "response", "shared_prefix", collate=model.family.collate, shares=shares)
        sizes = [PairSize.of(pair) for pair in pairs]
        packing = Packing(1, "shared_prefix", 1.0, shares)
        assert batch.input_ids.numel() == packing.tokens(sizes)
        assert batch.images["pixel_values"].numel() == packing.work(sizes) - packing.tokens(sizes)
    whole_prompts = shares == "prompts"
    assert [len(build_batch(row(family), "response", "shared_prefix", collate=model.family.collate,
                            shares=shares).images["pixel_values"]) for row in ROWS] == \
        [1, 6 if whole_prompts else 2, 5 if whole_prompts else 3]  # fmt: skip


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "gemma3"])
def test_pairs_without_relatives_have_the_same_bits(family: str) -> None:
    rows = [(2, 5, 7, 3), (1, 4, 2, 9), (0, 6, 3, 3)]
    model, pairs = tiny_pair_model(family), make_row(family, rows)
    alone, found = (
        run(model, pairs, "shared_prefix", "prompt+response", shares=shares) for shares in ("nothing", "images")
    )
    for name, value in vars(alone[0]).items():
        assert value is None or torch.equal(value, vars(found[0])[name]), name
    assert torch.equal(alone[1], found[1])
    assert all(torch.equal(gradient, found[2][name]) for name, gradient in alone[2].items())


@pytest.mark.parametrize("budget", [40, 4096])
def test_any_number_of_workers_and_any_budget_give_the_same_step(budget: int) -> None:
    """A small budget cuts trees; with four workers, there are fewer trees than workers."""
    model = tiny_pair_model("smolvlm")
    run_as(model, "shared_prefix")
    pairs = [*several_questions("smolvlm"), *four_answers("smolvlm")]
    dummy = replace(pairs[0], sample_index=-1)
    objective = ORPO(0.5, nll="prompt+response")
    expected = None
    for workers in (1, 2, 4):
        packing = Packing(budget, "shared_prefix", shares=model.family.shares)
        planner = StepPlanner(objective, packing, dummy, dummy, CPU, model.family.collate)
        total, sums = torch.zeros(()), torch.zeros(())
        for rank in range(workers):
            plan = planner.plan(planner.share(pairs, rank=rank, workers=workers))
            for batch in plan.batches:
                loss, more = objective.loss(model(batch), batch.weights, plan.normaliser)
                loss.backward()
                total, sums = total + loss.detach(), sums + more["accuracies"]
        found = total, sums, gradients(model)
        expected = found if expected is None else expected
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    alone = run(model, pairs, "concatenated", "prompt+response", objective=objective)
    normaliser = Normaliser(len(pairs), float(alone[0].nll_tokens.sum()))
    loss, _ = objective.loss(alone[0], torch.ones(len(pairs)), normaliser)
    assert expected is not None
    torch.testing.assert_close(expected[0], loss, rtol=1e-5, atol=1e-6)
