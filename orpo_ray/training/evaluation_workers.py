"""`orpo-ray evaluate --workers N`: several processes of the cluster measure a model together.

Each holds the whole model and scores its share of every step, as the workers of a run do when they evaluate. They are
plain actors: nothing is saved that a restart could go on from, and Ray Train would ask for a storage that all nodes
share.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.evaluation.measuring import Measure, Measured, Place, Work, measure
from orpo_ray.evaluation.targets import Target, find_again
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.files import is_remote
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.streaming.pipeline import own_errors
from orpo_ray.training.placement import ACCELERATOR, fitting_nodes, no_room
from orpo_ray.training.process_group import form_process_group, leave_process_group, listen
from orpo_ray.training.resources import Resources, threads_of_worker, too_many_workers, worker_resources

OPTION = "--workers"
ROOM_SECONDS = 120.0
"""How long to wait for other jobs on a cluster that starts no nodes."""
_SOME = 0.001  # of the resource that names a node's accelerator


class WorkerLost(OrpoRayError):
    """A process that measured a model ended, or failed."""


@dataclass(frozen=True)
class Task:
    """What all workers do."""

    target: Target
    work: Work
    grounding: bool
    run_uri: str | None
    """The run whose report shows single tokens, if any."""
    num_workers: int
    threads: int
    """Of each worker on a CPU."""
    max_encoders: int
    """Encoding tasks at a time, for all workers together."""


class EvaluationWorker:
    """One of the processes that measure a model together: an actor."""

    def __init__(self, rank: int, task: Task) -> None:
        """Keep what to do, and as which worker."""
        self._rank, self._task = rank, task
        self._feeds: list[Any] = []

    def listen(self) -> tuple[str, int]:
        """Open the port at which the workers meet; return its address. Of rank 0."""
        self._listener = listen()
        address, port = self._listener.getsockname()[:2]
        return address, port

    def measure(self, meeting: tuple[str, int]) -> tuple[Measured | None, str]:
        """Measure the model. A collective.

        Returns:
            What was measured and what there is to say, on rank 0.
        """
        import torch

        from orpo_ray.objective.collectives import gather_objects

        task, scaling = self._task, self._task.work.recipe.scaling
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(threads_of_worker(scaling, task.threads))
        listener = self._listener if self._rank == 0 else None
        form_process_group(device, self._rank, task.num_workers, meeting, listener, scaling.timeout_s)
        said = io.StringIO()

        def from_rank_zero(own: Any) -> Any:
            # The other workers' copies do not count as handles: the feed lives as long as the one that is kept here.
            self._feeds.append(own)
            return gather_objects(own)[0]

        place = Place(self._rank, task.num_workers, task.max_encoders, from_rank_zero)
        # The mirror of a remote folder lives as long as `_folder`.
        _folder, target = find_again(task.target) if is_remote(task.target.name) else (None, task.target)
        run = None if task.run_uri is None else RunFolder(task.run_uri)
        found = measure(target, task.work, Console(file=said), task.grounding, run, place)
        leave_process_group()
        return (found, said.getvalue()) if self._rank == 0 else (None, "")


def on_workers(count: int) -> Measure:
    """Return what measures a model on so many workers of the cluster. Raises UserError for none."""
    if count < 1:
        raise UserError("there must be at least one worker", field=OPTION, value=count, fix=f"use {OPTION} 1 or more")
    return partial(measure_on_workers, count)


def measure_on_workers(
    count: int, target: Target, work: Work, console: Console, grounding: bool, run: RunFolder | None = None
) -> Measured:
    """As `measure`, on workers of the cluster, each with the CPUs and GPUs that the recipe gives a worker.

    Raises:
        UserError: the model cannot be loaded, nothing can be scored, or the cluster has no room for the workers.
        WorkerLost: a worker ended, or failed in another way.
    """
    start_ray()
    recipe = work.recipe.model_copy(
        update={"scaling": work.recipe.scaling.model_copy(update={"num_workers": count, "sequence_parallel": 1})}
    )
    resources = worker_resources(recipe, ray.cluster_resources(), nodes=fitting_nodes(recipe.scaling, ray.nodes()))
    task = Task(
        target, work, grounding, None if run is None else run.uri, count,
        max(1, resources.cpu_threads // count), resources.max_encoders,
    )  # fmt: skip
    if (crowd := too_many_workers(recipe, ray.cluster_resources())) is not None:
        console.print(f"[yellow]warning:[/yellow] {crowd}", highlight=False, soft_wrap=True)
    console.print(f"starting {count} worker(s) for {target.title}", highlight=False, soft_wrap=True, markup=False)
    with _workers(task, recipe, resources) as workers:
        try:
            with own_errors():
                meeting = ray.get(workers[0].listen.remote())
                found, said = _first_of([worker.measure.remote(meeting) for worker in workers])
        except ray.exceptions.RayTaskError as error:
            raise WorkerLost(f"a worker failed: {type(error.cause).__name__}: {error.cause}") from error
        except ray.exceptions.RayActorError as error:
            raise WorkerLost(
                f"a worker was lost: {str(error).splitlines()[0]}\n  fix: run the same command again; give each worker "
                "more memory if the node's ran out"
            ) from error
    console.print(said.rstrip(), highlight=False, soft_wrap=True, markup=False)
    return found


@contextmanager
def _workers(task: Task, recipe: Recipe, resources: Resources) -> Iterator[list[Any]]:
    """Start the workers when the cluster has room for all of them; end them, and free the room."""
    scaling = recipe.scaling
    bundle = resources.per_worker
    if scaling.accelerator_type:
        bundle = bundle | {ACCELERATOR + scaling.accelerator_type: _SOME}
    labels = [scaling.labels] * task.num_workers if scaling.labels else None
    group = placement_group([bundle] * task.num_workers, strategy="PACK", bundle_label_selector=labels)
    workers: list[Any] = []
    try:
        if not group.wait(scaling.nodes_timeout_s or ROOM_SECONDS):
            raise _no_room(recipe, task.num_workers, resources)
        for rank in range(task.num_workers):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            actor = ray.remote(EvaluationWorker).options(
                num_cpus=resources.cpus, num_gpus=resources.gpus, scheduling_strategy=where
            )
            workers.append(actor.remote(rank, task))
        yield workers
    finally:
        for worker in workers:
            ray.kill(worker)
        remove_placement_group(group)


def _no_room(recipe: Recipe, count: int, resources: Resources) -> UserError:
    if recipe.scaling.nodes_timeout_s:
        return no_room(recipe.scaling, count, resources.per_worker)
    return UserError(
        f"the cluster had no room for the workers within {ROOM_SECONDS:g} s, since other jobs use it",
        field=OPTION, value=count, fix="wait for their end, or use fewer workers",
    )  # fmt: skip


def _first_of(references: Sequence[Any]) -> tuple[Measured, str]:
    """Wait for all workers; return what rank 0 returns. Raises the first error, whichever worker has it."""
    waiting = list(references)
    while waiting:
        done, waiting = ray.wait(waiting)
        ray.get(done)
    found: tuple[Measured, str] = ray.get(references[0])
    return found
