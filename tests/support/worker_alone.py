"""A real `Worker` of the training program, without Ray."""

from __future__ import annotations

from typing import Any

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.from_recipe import encoder_of, run_data
from orpo_ray.objective.step_planner import StepPlan
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.training.worker import Worker
from orpo_ray.training.worker_context import WorkerContext
from orpo_ray.training.worker_start import WorkerConfig


class Silence:
    """A line to nobody."""

    def update(self, **state: Any) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def asks_to_stop(self) -> bool:
        return False


def make_worker(
    recipe: Recipe, device: torch.device, rank: int = 0, num_workers: int = 1, num_steps: int = 10
) -> Worker:
    """Set up a worker of a run. It has no feed: give `train_step` plans."""
    RunFolder(recipe.run_uri).make()
    train, _ = run_data(recipe)
    config = WorkerConfig(recipe.model_dump(mode="json"), train, None, encoder_of(recipe), num_steps, 1.0, 2, 1)
    return Worker(
        config,
        None,
        None,
        WorkerContext(rank, num_workers, num_workers, device, "here", Silence(), lambda metrics: None, False),
    )


def plan_step(worker: Worker, pairs: list[Any], step: int) -> StepPlan:
    """Prepare a worker's share of these pairs."""
    return worker._prepared(worker.planner.share(pairs, step=step, rank=worker.rank, workers=worker.num_workers))


def train_step(worker: Worker, plan: StepPlan) -> dict[str, float]:
    """Let a worker train on what `plan_step` returned, and log the step. Returns the metrics."""
    metrics = worker._train_step(plan, waited=0.0)
    worker._advance(plan, metrics)
    assert worker.position.step == plan.step + 1
    return metrics


def make_step(worker: Worker, pairs: list[Any], step: int) -> dict[str, float]:
    """Plan a step and train on it. Returns the metrics."""
    return train_step(worker, plan_step(worker, pairs, step))
