"""Divide the CPUs and GPUs of a cluster among the workers of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import ScalingConfig
from orpo_ray.errors import UserError
from orpo_ray.streaming.pipeline import least_cpus

# Of the CPUs that Ray Train's workers leave on a node, Ray's coordinator gives Ray Data whole ones only.
WHOLE_CPU = 1.0
# Encoding tasks per worker that a cluster may start nodes for.
ENCODERS_TO_COME = 8


@dataclass(frozen=True)
class Resources:
    """Resources of a worker."""

    cpus: float
    """CPUs that Ray reserves for the worker."""
    gpus: float
    """GPUs of the worker; a fraction of one if runs share it."""
    cpu_threads: int
    """Threads that torch uses in all workers of the run together when they train on CPUs."""
    max_encoders: int
    """Encoding tasks that may run at the same time for all workers of the run."""

    @property
    def per_worker(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def worker_resources(
    recipe: Recipe,
    cluster: dict[str, float],
    runs: int = 1,
    reserved: float = 0.0,
    nodes: Sequence[Mapping[str, float]] = (),
) -> Resources:
    """Divide a cluster among workers.

    Args:
        recipe: the recipe, with `scaling`.
        cluster: Ray's resources, `CPU` and `GPU`.
        runs: number of such runs that must fit at the same time.
        reserved: CPUs that other processes hold.
        nodes: the resources of each node that may hold workers; by default, of all nodes together.

    Raises:
        UserError: the workers and the data's tasks do not fit.
    """
    scaling = recipe.scaling
    workers = scaling.min_workers * runs
    cpus = cluster.get("CPU", 0.0)
    gpus = sum(node.get("GPU", 0.0) for node in nodes or [cluster])
    per_worker = float(gpus > 0) if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    if 0 < per_worker < 1 < scaling.max_workers:
        raise UserError(
            "the workers of one run cannot share a GPU: NCCL refuses it",
            field="scaling.gpus_per_worker",
            value=per_worker,
            fix="set it to 1, or scaling.num_workers to 1",
        )
    if scaling.nodes_timeout_s:
        return _of_nodes_to_come(scaling, cpus, gpus, runs)
    if per_worker * workers > gpus:
        raise UserError(
            f"{workers} worker(s) need {per_worker * workers:g} GPU(s), and the cluster has {gpus:g}",
            field="scaling.num_workers",
            value=scaling.num_workers,
            fix=f"use at most {int(gpus)} GPU(s), or set scaling.gpus_per_worker to 0 to train on CPUs",
        )
    for_data = least_cpus(runs) + reserved
    if not isinstance(scaling.num_workers, int):
        wanted = _cpus_of_elastic_worker(scaling, per_worker, nodes)
        encoders = max_encoders(cpus, wanted, workers)
        return Resources(wanted, per_worker, os.cpu_count() or 1, encoders)
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
        cpu_threads=max(1, (os.cpu_count() or 1) // runs),
        max_encoders=max_encoders(cpus, wanted, workers, runs),
    )


def threads_of_worker(scaling: ScalingConfig, share: int) -> int:
    """Return the threads that a worker computes with on a CPU.

    Args:
        scaling: of the recipe.
        share: of the machine's CPUs.
    """
    return max(1, share if scaling.cpus_per_worker is None else min(share, int(scaling.cpus_per_worker)))


def too_many_workers(recipe: Recipe, cluster: Mapping[str, float]) -> str | None:
    """Say that the workers of a run share CPUs, which makes them slow; None if they do not."""
    workers, cpus = recipe.scaling.min_workers, cluster.get("CPU", 0.0)
    if recipe.scaling.nodes_timeout_s or cluster.get("GPU", 0.0) or workers <= cpus:
        return None
    return f"{workers} workers share {cpus:g} CPU(s): they train slower than {max(1, int(cpus) - 1)} worker(s) would"


def _of_nodes_to_come(scaling: ScalingConfig, cpus: float, gpus: float, runs: int) -> Resources:
    """Return the resources of each worker on a cluster that starts nodes for them.

    Raises:
        UserError: it is not known whether the workers will have GPUs.
    """
    if scaling.gpus_per_worker == "auto" and not gpus and scaling.accelerator_type is None:
        raise UserError(
            "the cluster has no GPU yet, so it is not known whether the run will have GPUs",
            field="scaling.gpus_per_worker",
            value="auto",
            fix="set it to 1, or to 0 to train on CPUs; or set scaling.accelerator_type",
        )
    per_worker = 1.0 if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    encoders = max(ENCODERS_TO_COME * scaling.max_workers, max_encoders(cpus, 0.0, 0, runs))
    return Resources(scaling.cpus_per_worker or 1.0, per_worker, max(1, (os.cpu_count() or 1) // runs), encoders)


def max_encoders(cpus: float, per_worker: float, workers: int, runs: int = 1) -> int:
    """Return how many encoding tasks of a run fit beside the workers.

    Args:
        cpus: of the cluster.
        per_worker: CPUs of a worker.
        workers: of all runs together.
        runs: that share the cluster.
    """
    return max(1, int((cpus - per_worker * workers) / runs))


def _cpus_of_elastic_worker(scaling: ScalingConfig, gpus: float, nodes: Sequence[Mapping[str, float]]) -> float:
    """Return the CPUs of each worker if Ray Train fills the nodes with workers, so that some are left for the data.

    Raises:
        UserError: the least number of workers does not fit, or they would take all CPUs.
    """
    smallest = min((node.get("CPU", 0.0) for node in nodes), default=0.0)
    # A worker for each GPU; or for each CPU of a node but two.
    cpus = scaling.cpus_per_worker or (1.0 if gpus else _cpus_so_that_one_is_left(smallest))
    fitting = [_fitting(node, cpus, gpus) for node in nodes]
    if sum(fitting) < scaling.min_workers:
        raise UserError(
            f"the cluster has room for {sum(fitting)} worker(s) with {cpus:g} CPU(s) and {gpus:g} GPU(s) each",
            field="scaling.num_workers",
            value=scaling.num_workers,
            fix="lower the first number or scaling.cpus_per_worker, or add nodes",
        )
    left = max(node.get("CPU", 0.0) - count * cpus for node, count in zip(nodes, fitting, strict=True))
    if left < WHOLE_CPU and sum(fitting) <= scaling.max_workers:
        raise UserError(
            f"workers with {cpus:g} CPU(s) each would leave no whole CPU on any node, and reading data needs one",
            field="scaling.cpus_per_worker",
            value=scaling.cpus_per_worker,
            fix="set it so that the workers that fit on a node leave one CPU; a node needs three CPUs for that",
        )
    return cpus


def _cpus_so_that_one_is_left(cpus: float) -> float:
    """Return the CPUs of a worker so that as many workers as possible leave one CPU of a node, which they fill."""
    workers = max(1, math.ceil(cpus) - 2)
    return round((cpus / (workers + 1) + (cpus - WHOLE_CPU) / workers) / 2, 4)


def _fitting(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Return how many workers Ray Train puts on a node."""
    fitting = node.get("CPU", 0.0) // cpus if cpus > 0 else 0.0
    return int(min(fitting, node.get("GPU", 0.0) // gpus) if gpus else fitting)
