"""Entry point of every worker. Starts reading the data, then imports the training program.

Nothing heavy is imported at the top: the driver imports this file too, and a worker's data is read while the worker
imports torch, transformers and DeepSpeed, which takes seconds.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import OrpoRayError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.storage.scratch import clear_dead_scratch
from orpo_ray.training.checkpoint_choice import choose_newest, clean, clear_saving
from orpo_ray.training.resources import max_encoders
from orpo_ray.training.teardown import training_begins, training_ended, training_failed

if TYPE_CHECKING:
    from orpo_ray.streaming.steps import Take

POLL_SECONDS = 0.2
# Environment variables that configure the allocator; the others are earlier names that torch reads too.
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@dataclass(frozen=True)
class WorkerConfig:
    """Settings that the driver determines once, for all workers."""

    recipe: dict[str, Any]
    """The resolved recipe."""
    train: ReadSpec
    """Training rows of all workers."""
    held_out: ReadSpec | None
    """Held-out rows of all workers."""
    encoder: EncoderSpec
    num_steps: int
    """Optimizer steps of the whole run."""
    cpus: float
    """CPUs that Ray reserves for each worker."""
    cpu_threads: int
    """Threads of all workers together in a run on CPUs."""
    max_encoders: int
    """Encoding tasks at a time, for all workers together."""


class DiskFull(OrpoRayError):
    """A file of the run, other than a checkpoint, could not be written."""


def train_worker(config: dict[str, Any]) -> None:
    """Train as one worker of a run.

    An error that a restart would repeat is kept in the run's status, where the driver finds it.

    Args:
        config: `status`, the run's `RunStatus` actor. Nothing else, so that Ray Train's controller, which handles this
            mapping, needs none of this package.

    Raises:
        OrpoRayError: bad input or a run that cannot go on.
    """
    prefer_expandable_segments()
    status = config["status"]
    worker_config = _wait_for_config(status)
    if worker_config is None:
        return
    worker_config = _fitted(worker_config)
    try:
        checkpoint = _agreed_checkpoint(worker_config, status)
        feed = _feed_from_the_start(worker_config) if checkpoint is None else None
        from orpo_ray.training.process_group import join_process_group, leave_process_group
        from orpo_ray.training.worker import Worker
        from orpo_ray.training.worker_context import WorkerContext

        join_process_group(parse_recipe(worker_config.recipe).scaling.timeout_s)
        worker = Worker(worker_config, checkpoint, feed, WorkerContext.of_ray_train(status))
        training_begins(worker)
        worker.run()
        training_ended()
        leave_process_group()
    except OrpoRayError as error:
        training_ended()
        ray.get(status.fail.remote(error))
        raise
    except OSError as error:
        training_failed()
        if (full := full_disk(error)) is None:
            raise
        ray.get(status.fail.remote(full))
        raise full from error
    except BaseException:
        training_failed()
        raise


def full_disk(error: OSError) -> DiskFull | None:
    """Return the message about a full disk, if that is what an error says."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return DiskFull(f"a disk is full: {error}\n  fix: make room; the same command resumes from the latest checkpoint")


def _agreed_checkpoint(config: WorkerConfig, status: Any) -> str | None:
    """Return the name of the checkpoint that all workers resume from, or None. A collective.

    Rank 0 chooses, and deletes what no run needs any longer: damaged checkpoints, old ones, and the scratch of workers
    that were killed.
    """
    context = ray.train.get_context()
    recipe = parse_recipe(config.recipe)
    if context.get_local_rank() == 0:
        clear_dead_scratch(recipe.checkpoint.scratch)
    name = None
    if context.get_world_rank() == 0:
        run = RunFolder(recipe.run_uri)
        clear_saving(run)
        name = choose_newest(run, lambda text: ray.get(status.warn.remote(text)))
        if name is not None:
            clean(run, name, recipe.checkpoint.keep)
    if context.get_world_size() == 1:
        return name
    agreed: str | None = broadcast_from_rank_zero(name)
    return agreed


def prefer_expandable_segments() -> None:
    """Let the CUDA allocator grow its memory segments: micro-batches differ in size, and fixed segments fragment.

    Must run before CUDA starts. Settings of the user's environment stay.
    """
    if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def _wait_for_config(status: Any) -> WorkerConfig | None:
    """Wait for what the driver decides; return None after an error that a restart would repeat."""
    while ray.get(status.fatal.remote()) is None:
        reference = ray.get(status.config.remote())
        if reference is not None:
            config: WorkerConfig = ray.get(reference)
            return config
        time.sleep(POLL_SECONDS)
    return None


def _fitted(config: WorkerConfig) -> WorkerConfig:
    """Let as many encoding tasks run as the cluster has room for beside its workers now, if their number changes."""
    if isinstance(parse_recipe(config.recipe).scaling.num_workers, int):
        return config
    cpus, workers = ray.cluster_resources().get("CPU", 0.0), ray.train.get_context().get_world_size()
    return replace(config, max_encoders=max_encoders(cpus, config.cpus, workers))


def _feed_from_the_start(config: WorkerConfig) -> Take:
    """Start reading and encoding the first step, for all workers."""
    from orpo_ray.streaming.steps import open_feed

    context = ray.train.get_context()
    together = parse_recipe(config.recipe).scaling.sequence_parallel
    ranks = (context.get_world_rank(), context.get_world_size())
    return open_feed(config.train, config.encoder, config.max_encoders, *ranks, together)
