"""Answers of two workers between steps of training: each answers its share, and training goes on unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_ray.data.encoding import PairEncoder
from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.data.packing import PairBatch
from orpo_ray.evaluation.generation import Answerer, generate_held_out
from orpo_ray.evaluation.token_scores import score_tokens
from orpo_ray.objective.logps import PairLogps
from orpo_ray.processing.processor import load_processor
from support.engine_memory import end_engine
from support.engines_by_hand import Training, recipe_of
from support.tiny_runs import write_pairs
from support.worker_group import worker_group

STAGES = (0, 2)


def answers(rank: int, size: int, data: str) -> list[tuple[list[list[float]], list[Any], Any]]:
    """For each stage: losses of a step before and one after, answers, and log-probs of single tokens."""
    found = []
    for stage in STAGES:
        recipe = recipe_of(data={"train": data, "eval": data}, deepspeed={"zero_stage": stage})
        training = Training(recipe, rank, size)
        encoder = PairEncoder(load_processor(recipe.model.id, None), 512)
        held_out = held_out_data(recipe)
        assert held_out is not None
        training.model.train()
        curve = [training.step()]
        answerer = Answerer(training.model.model, encoder, 4)
        said = generate_held_out(answerer, held_out, 3, rank, size)

        def forward(batch: PairBatch, engine: Any = training.engine) -> PairLogps:
            logps: PairLogps = engine.forward(batch)
            return logps

        tokens = score_tokens(training.model, forward, encoder, training.planner, held_out, [1])
        curve.append(training.step())
        end_engine(training.engine)
        found.append((curve, [(each.sample_index, each.greedy, each.sampled) for each in said], tokens))
    return found


def test_two_workers_answer_alike_at_stages_0_and_2(tmp_path: Path) -> None:
    ranks = worker_group(2).run(answers, str(write_pairs(tmp_path, 3)))
    (curve, said, tokens), *_ = ranks[0]
    assert [index for index, _, _ in said] == [0, 1, 2]
    for rank in ranks:
        for other_curve, other_said, other_tokens in rank:
            assert other_said == said
            assert other_curve == [pytest.approx(step, rel=1e-5) for step in curve]
            for side in ("chosen", "rejected"):
                assert [logp for _, logp in other_tokens[1][side]] == pytest.approx(
                    [logp for _, logp in tokens[1][side]], abs=1e-4
                )
