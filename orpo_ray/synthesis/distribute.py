"""Parts made by workers anywhere in the cluster, with Ray Data. Each worker is a process that loads the models once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray
import ray.data
import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import OrpoRayError
from orpo_ray.ray_cluster.start import on_this_node
from orpo_ray.streaming.pipeline import own_errors, quiet
from orpo_ray.synthesis.part import Job, PartMaker
from orpo_ray.synthesis.part_files import PartFacts


class PartFailed(OrpoRayError):
    """A part ended every process that made it."""


@ray.remote(num_cpus=0)
class _Attempts:
    """Counts how often each part was begun. Ray Data repeats the part of a lost worker without end."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, part: int) -> int:
        """Count another attempt; return their number."""
        self._counts[part] += 1
        return self._counts[part]


class PartWorker:
    """Makes parts in a process of its own."""

    def __init__(self, job: Job, cpus: float, attempts: Any, max_failures: int) -> None:
        # The same on every worker: the last bits of a sum depend on the number of threads.
        torch.set_num_threads(max(1, int(cpus)))
        self._maker = PartMaker(job)
        self._attempts, self._max_failures = attempts, max_failures

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make a part; return its facts. Raises PartFailed after too many attempts."""
        part = row["part"]
        failures = ray.get(self._attempts.begin.remote(part)) - 1
        if failures > self._max_failures:
            raise PartFailed(
                f"part {part} ended its worker {failures} times, probably for lack of memory\n"
                "  fix: lower synthesize.num_workers or optim.tokens_per_microbatch, and run the command again; "
                "synthesize.rows_per_part can be lowered for another set alone (name=...)"
            )
        return {"facts": json.dumps(asdict(self._maker.make(part)))}


def iter_parts(job: Job, parts: Sequence[int]) -> Iterator[PartFacts]:
    """Make parts and yield their facts, as soon as each is complete. Parts of lost workers are made again.

    Raises:
        UserError: as `PartMaker.make`.
        PartFailed: a part ended its worker more often than `scaling.max_failures` allows.
    """
    recipe = Recipe.model_validate(job.recipe)
    cpus, gpus = room_of_a_worker(recipe)
    count = min(workers_of(recipe, cpus, gpus), len(parts))
    attempts = _Attempts.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    dataset = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map(
        PartWorker,
        fn_constructor_args=(job, cpus, attempts, recipe.scaling.max_failures),
        num_cpus=cpus,
        num_gpus=gpus or None,
        label_selector=recipe.scaling.labels or None,
        accelerator_type=recipe.scaling.accelerator_type,
        compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
    )
    quiet(dataset, ordered=False)
    with own_errors():
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from (PartFacts(**json.loads(facts)) for facts in batch["facts"].to_pylist())


def room_of_a_worker(recipe: Recipe) -> tuple[float, float]:
    """Return the CPUs and GPUs that a worker needs."""
    scaling = recipe.scaling
    wanted = scaling.gpus_per_worker
    gpus = (1.0 if ray.cluster_resources().get("GPU") else 0.0) if wanted == "auto" else float(wanted)
    return scaling.cpus_per_worker or 1.0, gpus


def workers_of(recipe: Recipe, cpus: float, gpus: float) -> int:
    """Return how many workers make parts; with `auto`, as many as the cluster has room for."""
    if recipe.synthesize.num_workers != "auto":
        return recipe.synthesize.num_workers
    room = ray.cluster_resources()
    fitting = [room.get("CPU", 1.0) / cpus, *([room.get("GPU", 0.0) / gpus] if gpus else [])]
    return max(1, int(min(fitting)))
