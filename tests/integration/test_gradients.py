"""Gradients of bfloat16 weights are added up and travel in float32, on every ZeRO stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.objective.orpo import ORPO
from support.counting import Collective, Counter
from support.engine_memory import end_engine
from support.engines_by_hand import Training, recipe_of
from support.worker_group import worker_group

SMALL, REPEATS = 1 / 640, 16  # each addition is below half the distance of two bfloat16 numbers


def recipe_in_bfloat16(stage: int, **sections: Any) -> Any:
    return recipe_of(model={"dtype": "bfloat16"}, deepspeed={"zero_stage": stage}, **sections)


def norms(rank: int, num_workers: int, stages: list[int]) -> list[tuple[float, float]]:
    """The gradient's norm of one micro-batch, and after adding it `REPEATS` times more, scaled by `SMALL`."""
    found = []
    for stage in stages:
        training = Training(recipe_in_bfloat16(stage, optim={"learning_rate": 1e-30}), rank, num_workers)
        plan = training.planner.plan(training.share)
        (batch,) = plan.batches
        both = []
        for repeats in (0, REPEATS):
            for factor in (1.0, *[SMALL] * repeats):
                loss, _ = ORPO(0.1).loss(training.engine.forward(batch), batch.weights, plan.normaliser)
                training.engine.backward(loss * factor)
            both.append(training.engine.step())
        end_engine(training.engine)
        found.append((both[0], both[1]))
    return found


# Stages 1 and 2 share their code.
@pytest.mark.parametrize("stages", [[2], pytest.param([0, 1, 3], marks=pytest.mark.nightly)])
def test_many_small_gradients_are_not_lost(stages: list[int]) -> None:
    """In bfloat16, additions of 1/640 to 1 would leave 1."""
    for stage, (one, sum_) in zip(stages, worker_group(1).run(norms, stages)[0], strict=True):
        assert sum_ == pytest.approx(one * (1 + REPEATS * SMALL), rel=2e-3), stage


def collectives_of_a_step(rank: int, num_workers: int, stages: list[int]) -> list[tuple[list[Collective], int]]:
    """The second step's collectives, and the bytes of the trained weights in float32."""
    found = []
    for stage in stages:
        training = Training(recipe_in_bfloat16(stage), rank, num_workers)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in training.model.parameters() if p.requires_grad)
        training.step()
        with Counter() as counter:
            training.step()
        end_engine(training.engine)
        found.append((counter.collectives, 4 * trained))
    return found


@pytest.mark.parametrize("stages", [[0, 3], pytest.param([1, 2], marks=pytest.mark.nightly)])
def test_gradients_travel_in_float32(stages: list[int]) -> None:
    """Between two workers; weights are gathered in bfloat16."""
    reductions = ("allreduce_", "reduce_", "reduce_scatter_", "_reduce_scatter_base_")
    for stage, (calls, size) in zip(stages, worker_group(2).run(collectives_of_a_step, stages)[0], strict=True):
        reduced = [call for call in calls if call.name in reductions and call.bytes > 64]
        assert {call.dtype for call in reduced} == {torch.float32}, stage
        assert sum(call.bytes for call in reduced) >= size, stage


def reads_in_a_step(rank: int, num_workers: int) -> int:
    training = Training(recipe_in_bfloat16(0), rank, num_workers)
    training.step()
    plan = training.planner.plan(training.share)
    loss, _ = ORPO(0.1).loss(training.engine.forward(plan.batches[0]), plan.batches[0].weights, plan.normaliser)
    with Counter() as counter:
        training.engine.backward(loss)
        training.engine.step()
    return counter.reads


def test_an_unsharded_step_reads_one_value_from_the_device() -> None:
    """The gradient's norm; reading one value for each parameter would stop a GPU as often."""
    assert worker_group(1).run(reads_in_a_step)[0] == 1


def saved_and_loaded(rank: int, num_workers: int, folder: str) -> dict[int, list[list[list[float]]]]:
    """Steps 3 and 4 by ZeRO stage, first as they continue and then from the checkpoint of step 2."""
    found = {}
    for stage in (0, 1):
        path, mine = Path(folder) / str(stage), Path(folder) / f"{stage}-{rank}"
        training = Training(recipe_in_bfloat16(stage), rank, num_workers)
        training.step(), training.step()
        training.engine.save(mine)
        shutil.copytree(mine, path, dirs_exist_ok=True)
        torch.distributed.barrier()
        tail = [training.step(), training.step()]
        end_engine(training.engine)
        training = Training(recipe_in_bfloat16(stage), rank, num_workers)
        training.engine.load(path)
        found[stage] = [tail, [training.step(), training.step()]]
        end_engine(training.engine)
    return found


def test_the_float32_weights_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    for stage, (tail, again) in worker_group(2).run(saved_and_loaded, str(tmp_path))[0].items():
        assert again == tail, stage
