"""Entry point of every worker. Starts reading the data, then imports the training program.

Nothing heavy is imported at the top: the driver imports this file too, and a worker's data is read while the worker
imports torch, transformers and DeepSpeed, which takes seconds.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.train

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import OrpoRayError

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
    status: Any
    """The `RunStatus` actor, which the driver watches."""
    cpu_threads: int
    """Threads of one worker in a run on CPUs."""
    max_encoders: int
    """Encoding tasks at a time, for all workers together."""


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
    worker_config = _wait_for_config(config["status"])
    if worker_config is None:
        return
    try:
        feed = _feed_from_the_start(worker_config) if ray.train.get_checkpoint() is None else None
        from orpo_ray.training.process_group import join_process_group, leave_process_group
        from orpo_ray.training.worker import Worker

        join_process_group(parse_recipe(worker_config.recipe).scaling.timeout_s)
        Worker(worker_config, feed).run()
        leave_process_group()
    except OrpoRayError as error:
        ray.get(worker_config.status.fail.remote(error))
        raise


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


def _feed_from_the_start(config: WorkerConfig) -> Take:
    """Start reading and encoding the first step, for all workers."""
    from orpo_ray.streaming.steps import open_feed

    context = ray.train.get_context()
    return open_feed(
        config.train, config.encoder, config.max_encoders, context.get_world_rank(), context.get_world_size()
    )
