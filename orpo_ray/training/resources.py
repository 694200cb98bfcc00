"""Divide the CPUs and GPUs of a cluster among the workers of a run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.streaming.pipeline import least_cpus


@dataclass(frozen=True)
class Resources:
    """Resources of a worker."""

    cpus: float
    """CPUs that Ray reserves for the worker."""
    gpus: float
    """GPUs of the worker; a fraction of one if runs share it."""
    cpu_threads: int
    """Threads that torch uses when the worker trains on CPUs."""
    max_encoders: int
    """Encoding tasks that may run at the same time for all workers of the run."""


def worker_resources(recipe: Recipe, cluster: dict[str, float], runs: int = 1, reserved: float = 0.0) -> Resources:
    """Divide a cluster among workers.

    Args:
        recipe: the recipe, with `scaling`.
        cluster: Ray's resources, `CPU` and `GPU`.
        runs: number of such runs that must fit at the same time.
        reserved: CPUs that other processes hold.

    Raises:
        UserError: the workers and the data's tasks do not fit.
    """
    scaling = recipe.scaling
    workers = scaling.num_workers * runs
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    per_worker = float(gpus > 0) if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    if 0 < per_worker < 1 < scaling.num_workers:
        raise UserError(
            "the workers of one run cannot share a GPU: NCCL refuses it",
            field="scaling.gpus_per_worker",
            value=per_worker,
            fix="set it to 1, or scaling.num_workers to 1",
        )
    if per_worker * workers > gpus:
        raise UserError(
            f"{workers} worker(s) need {per_worker * workers:g} GPU(s), and the cluster has {gpus:g}",
            field="scaling.num_workers",
            value=scaling.num_workers,
            fix=f"use at most {int(gpus)} GPU(s), or set scaling.gpus_per_worker to 0 to train on CPUs",
        )
    for_data = least_cpus(runs) + reserved
    # Rounded down, so that the sum never exceeds the cluster.
    wanted = scaling.cpus_per_worker or min(1.0, math.floor(100 * (cpus - for_data) / workers) / 100)
    if wanted <= 0 or wanted * workers + for_data > cpus:
        raise UserError(
            f"{workers} worker(s) with {max(wanted, 0.01):g} CPU(s) each, and {for_data:g} CPU(s) for the data, "
            f"exceed the cluster's {cpus:g}",
            field="scaling.cpus_per_worker",
            value=scaling.cpus_per_worker,
            fix="lower scaling.cpus_per_worker, scaling.num_workers or tune.max_concurrent, or add nodes",
        )
    return Resources(
        cpus=wanted,
        gpus=per_worker,
        cpu_threads=max(1, (os.cpu_count() or 1) // workers),
        max_encoders=max(1, int((cpus - wanted * workers) / runs)),
    )
