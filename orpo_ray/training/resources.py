"""What each worker of a run gets of a cluster, and whether all of it fits."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.streaming.pipeline import least_cpus


@dataclass(frozen=True)
class Resources:
    """What each worker holds, and how many encoding tasks work for it."""

    cpus: float
    gpus: int
    cpu_threads: int
    max_encoders: int


def worker_resources(recipe: Recipe, cluster: dict[str, float], runs: int = 1, reserved: float = 0.0) -> Resources:
    """What each worker gets of this cluster. Raises UserError if they cannot all run beside the data's tasks.

    runs: how many runs like this are to fit at a time. reserved: CPUs that something else holds.
    """
    scaling = recipe.scaling
    workers = scaling.num_workers * runs
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    per_worker = int(gpus > 0) if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    if per_worker * workers > gpus:
        raise UserError(
            f"{workers} worker(s) with a GPU each, and the cluster has {gpus:g}",
            field="scaling.num_workers",
            value=scaling.num_workers,
            fix=f"ask for at most {int(gpus)} in all, or set scaling.gpus_per_worker to 0",
        )
    for_data = least_cpus(workers) + reserved
    # Rounded down, so that the shares never add up to more than there is.
    wanted = scaling.cpus_per_worker or min(1.0, math.floor(100 * (cpus - for_data) / workers) / 100)
    if wanted <= 0 or wanted * workers + for_data > cpus:
        raise UserError(
            f"{workers} worker(s) of {max(wanted, 0.01):g} CPU(s) and {for_data:g} for the data exceed the "
            f"cluster's {cpus:g}",
            field="scaling.cpus_per_worker",
            value=scaling.cpus_per_worker,
            fix="lower scaling.cpus_per_worker, scaling.num_workers or tune.max_concurrent, or add nodes",
        )
    return Resources(
        cpus=wanted,
        gpus=per_worker,
        cpu_threads=max(1, (os.cpu_count() or 1) // workers),
        max_encoders=max(1, int((cpus - wanted * workers) / workers)),
    )
