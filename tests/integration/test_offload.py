"""Offloaded optimizer states and weights change where numbers are, and none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.recipe import Recipe
from orpo_ray.objective.orpo import ORPO
from support.engine_memory import end_engine
from support.engines_by_hand import STEPS, Training, recipe_of, resumed
from support.worker_group import worker_group

OPTIMIZER = {"offload_optimizer": "cpu"}
BOTH = {**OPTIMIZER, "offload_param": "cpu"}


def recipe(stage: int, offload: dict[str, Any], dtype: str = "float32") -> Recipe:
    return recipe_of(model={"dtype": dtype}, deepspeed={"zero_stage": stage, **offload})


def offloaded_by(engine: Any) -> tuple[str, str]:
    """What DeepSpeed itself says about optimizer states and weights."""
    zero = getattr(getattr(engine, "deepspeed", None), "optimizer", None)
    optimizer = getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)
    return "cpu" if optimizer else "none", "cpu" if getattr(zero, "offload_param", False) else "none"


def curves(rank: int, workers: int, recipes: list[Recipe]) -> list[list[tuple[float, float]]]:
    """Loss of the last of three micro-batches, and the gradient norm, by step."""
    found = []
    for each in recipes:
        training = Training(each, rank, workers)
        assert offloaded_by(training.engine) == (each.deepspeed.offload_optimizer, each.deepspeed.offload_param)
        lines = []
        for _ in range(STEPS):
            plan = training.planner.plan(training.share)
            (batch,) = plan.batches
            for part in (0.25, 0.5, 0.25):
                loss, _ = ORPO(0.1).loss(training.engine.forward(batch), batch.weights, plan.normaliser)
                training.engine.backward(loss * part)
            lines.append((float(loss), training.engine.step()))
        end_engine(training.engine)
        found.append(lines)
    return found


@pytest.mark.nightly
def test_the_curve_is_that_of_a_run_without_it() -> None:
    """Gradients of several micro-batches are added up, also in main memory."""
    cases = [(1, OPTIMIZER), (2, OPTIMIZER), (3, OPTIMIZER), (3, BOTH)]
    plain, *offloaded = worker_group(2).run(curves, [recipe(0, {}), *(recipe(*case) for case in cases)])[0]
    assert plain[-1][0] < 0.8 * plain[0][0]
    for case, curve in zip(cases, offloaded, strict=True):
        assert curve == [pytest.approx(step, rel=1e-5) for step in plain], case


@pytest.mark.nightly
def test_bfloat16_weights_have_float32_copies_in_main_memory() -> None:
    """The curve is that of the same stage without offloading, and of that alone."""
    plain, offloaded = worker_group(2).run(curves, [recipe(2, {}, "bfloat16"), recipe(2, OPTIMIZER, "bfloat16")])[0]
    assert offloaded == [pytest.approx(step, rel=1e-5) for step in plain]


@pytest.mark.parametrize(
    "cases", [[(3, BOTH)], pytest.param([(1, OPTIMIZER), (2, OPTIMIZER)], marks=pytest.mark.nightly)]
)
def test_offloaded_states_come_back_from_a_checkpoint(cases: list[tuple[int, dict[str, Any]]], tmp_path: Path) -> None:
    for case, found in zip(cases, resumed([recipe(*case) for case in cases], tmp_path), strict=True):
        assert found["again"] == found["tail"], case
