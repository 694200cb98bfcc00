"""How many trials a cluster can run at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.streaming.pipeline import least_cpus
from orpo_ray.training.resources import Resources, worker_resources

DRIVER_CPUS = 0.01
"""The driver of a trial only waits for its workers, so it leaves them the CPUs."""


def divide_cluster(
    recipe: Recipe,
    num_trials: int,
    cluster: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]],
    size: int = 1,
) -> tuple[int, Resources]:
    """Return the number of trials, or packs of trials, at a time, and the resources of each of their workers.

    Args:
        recipe: of the sweep; its trials have a fixed number of workers.
        num_trials: number of trials that there will be.
        cluster: Ray's resources, `CPU` and `GPU`.
        nodes: the resources of each node that may hold workers.
        size: most trials of a pack.

    Raises:
        UserError: not even one trial fits, or not as many as the recipe says.
    """

    def fit(together: int) -> Resources:
        reserved = together * size * DRIVER_CPUS
        return worker_resources(recipe, dict(cluster), runs=together, reserved=reserved, nodes=nodes)

    wanted = recipe.tune.max_concurrent
    if wanted != "auto" and size == 1:
        together = min(wanted, num_trials)
        return together, fit(together)
    most = num_trials if wanted == "auto" else min(wanted, num_trials)
    for together in range(min(places(recipe, cluster, nodes), -(-most // size)), 1, -1):
        try:
            return together, fit(together)
        except UserError:
            continue  # fewer trials leave more for each
    return 1, fit(1)


def places(recipe: Recipe, cluster: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many trials or packs there are enough GPUs for, or without GPUs, whole CPUs."""
    scaling, workers = recipe.scaling, recipe.scaling.min_workers
    gpus = [node.get("GPU", 0.0) for node in nodes]
    per_worker = float(any(gpus)) if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    if per_worker:
        # A fraction of a GPU lies on one GPU.
        on_node = [math.floor(1 / per_worker) * int(count) if per_worker < 1 else int(count) for count in gpus]
        return max(1, sum(on_node) // workers)
    cpus = cluster.get("CPU", 0.0) - least_cpus(1)
    return max(1, int(cpus / (workers * (scaling.cpus_per_worker or 1.0))))
