"""What workers exchange in a step of the training program."""

from __future__ import annotations

from collections import Counter as Counts
from pathlib import Path
from typing import Any

import torch

from orpo_ray.data.from_recipe import encoder_of, run_data
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.training.worker import Worker
from orpo_ray.training.worker_context import WorkerContext
from orpo_ray.training.worker_start import WorkerConfig
from support.counting import Counter
from support.engines_by_hand import two_pairs
from support.tiny_runs import tiny_recipe
from support.worker_group import worker_group


class Silence:
    """A line to nobody."""

    def update(self, **state: Any) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def asks_to_stop(self) -> bool:
        return False


def collectives_of_a_step(rank: int, num_workers: int, storage: str) -> dict[str, int]:
    """Collectives of the second step by name; the first one finds out about tensors that are not there yet."""
    recipe = tiny_recipe(Path(storage), "run")
    RunFolder(recipe.run_uri).make()
    train, _ = run_data(recipe)
    config = WorkerConfig(recipe.model_dump(mode="json"), train, None, encoder_of(recipe), 10, 1.0, 2, 1)
    context = WorkerContext(
        rank, num_workers, num_workers, torch.device("cpu"), "here", Silence(), lambda metrics: None, False
    )
    worker = Worker(config, None, None, context)
    for step in range(2):
        plan = worker.planner.plan(worker.planner.share(two_pairs(), step=step, rank=rank, workers=num_workers))
        with Counter() as counter:
            metrics = worker._train_step(plan, waited=0.0)
        worker._advance(plan, metrics)
        assert worker.position.step == step + 1
    return dict(Counts(call.name for call in counter.collectives))


def test_a_step_has_one_collective_beside_those_of_the_gradient(tmp_path: Path) -> None:
    """Metrics, figures of each worker and requests travel together."""
    for found in worker_group(2).run(collectives_of_a_step, str(tmp_path)):
        assert found.pop("allgather_") == 1
        assert found.keys() == {"allreduce_"}
