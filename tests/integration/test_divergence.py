"""A gradient that is not finite changes nothing, on every engine; a run that diverges ends and keeps its checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.objective.orpo import ORPO
from orpo_ray.training.divergence import TrainingDiverged
from support.engine_memory import end_engine
from support.engines_by_hand import Training, recipe_of
from support.runs import run
from support.tiny_runs import tiny_recipe
from support.worker_group import worker_group


def curves_around_a_bad_step(rank: int, num_workers: int, raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Three steps, with and without a step between whose gradient is not finite on the last rank alone."""
    found = []
    for sections in raw:
        curves = []
        for bad_step in (None, 1):
            training = Training(recipe_of(**sections), rank, num_workers)
            curve, norm = [], 0.0
            for step in range(3):
                if step == bad_step:
                    (batch,) = training.planner.plan(training.share).batches
                    factor = math.inf if rank == num_workers - 1 else 1.0
                    loss, _ = ORPO(0.1).loss(
                        training.engine.forward(batch), batch.weights, training.planner.plan(training.share).normaliser
                    )
                    training.engine.backward(loss * factor)
                    norm = training.engine.step()
                curve.append(training.step())
            curves.append(curve)
            finite = training.engine.has_finite_weights()
            weight = next(p for p in training.model.parameters() if p.requires_grad)
            with torch.no_grad():
                getattr(weight, "ds_tensor", weight).view(-1)[0] = math.nan if rank == 0 else 0.0
                for master in getattr(training.engine, "_masters", {}).values():
                    master.view(-1)[0] = math.nan
            damaged = training.engine.has_finite_weights()
            end_engine(training.engine)
        found.append({"curves": curves, "norm": norm, "finite": finite, "damaged": damaged})
    return found


FLOAT, BRAIN = "float32", "bfloat16"
ALL = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in (FLOAT, BRAIN)]


@pytest.mark.parametrize(
    ("num_workers", "matrix"),
    [
        (1, [(0, FLOAT)]),
        (2, [(0, BRAIN), (3, FLOAT)]),
        *(pytest.param(number, ALL, marks=pytest.mark.nightly) for number in (1, 2)),
    ],
    ids=["one", "two", "one-all", "two-all"],
)
def test_a_gradient_that_is_not_finite_changes_nothing(num_workers: int, matrix: list[tuple[int, str]]) -> None:
    cases = [{"model": {"dtype": dtype}, "deepspeed": {"zero_stage": stage}} for stage, dtype in matrix]
    for rank in worker_group(num_workers).run(curves_around_a_bad_step, cases):
        for case, found in zip(cases, rank, strict=True):
            without, with_bad_step = found["curves"]
            assert with_bad_step == [pytest.approx(step, rel=1e-6) for step in without], case
            assert not math.isfinite(found["norm"]), case
            assert (found["finite"], found["damaged"]) == (True, False), case


def test_a_run_that_diverges_ends_and_keeps_the_checkpoint_before(ray_cluster: None, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        "diverges",
        optim={"learning_rate": 1e3, "warmup": 0, "max_steps": 200},
        checkpoint={"every_steps": 1, "keep": 2},
    )
    with pytest.raises(TrainingDiverged, match="fix: lower optim"):
        run(recipe)
    folder = Path(recipe.run_uri)
    assert not (folder / "final").exists()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) < 200
    states = [torch.load(path, weights_only=True) for path in folder.glob("checkpoint_*/engine/replicated.pt")]
    assert states
    assert all(weight.isfinite().all() for state in states for weight in state["weights"].values())
