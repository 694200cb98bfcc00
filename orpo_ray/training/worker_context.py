"""What surrounds a worker: its place among the workers of the run, and who hears of the run's progress."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR

from orpo_ray.training.run_status import StatusLine

if TYPE_CHECKING:
    import torch

    from orpo_ray.model.base_models import BaseModels


class Line(Protocol):
    """A line to whoever shows a run. It never waits."""

    def update(self, **state: Any) -> None:
        """Send what should be shown: `step, num_steps, phase, saved_at` and metrics."""

    def warn(self, text: str) -> None:
        """Send a warning."""

    def asks_to_stop(self) -> bool:
        """Whether the run should save a checkpoint and end, as far as is known by now."""


@dataclass(frozen=True)
class WorkerContext:
    """The surroundings of a worker."""

    rank: int
    num_workers: int
    workers_of_node: int
    """Number of workers on this worker's node."""
    device: torch.device
    node: str
    """Identifies this worker's node."""
    line: Line
    """Every worker may warn; rank 0 sends the rest."""
    report: Callable[[dict[str, float]], None]
    """Takes an evaluation, or the metrics of a checkpoint, with prefixes and `step`. A collective."""
    watches_nodes: bool
    """Whether Ray Train knows of nodes that will be taken away."""
    goes_on: bool = False
    """Whether the process goes on with other runs, so that the threads of this one must end with it."""
    bases: BaseModels | None = None
    """Keeps base models for further runs of this process."""

    @classmethod
    def of_ray_train(cls, status: Any) -> WorkerContext:
        """Return that of a worker of Ray Train.

        Args:
            status: the run's `RunStatus` actor.
        """
        import ray.train.torch

        context = ray.train.get_context()
        return cls(
            rank=context.get_world_rank(),
            num_workers=context.get_world_size(),
            workers_of_node=context.get_local_world_size(),
            device=ray.train.torch.get_device(),
            node=ray.get_runtime_context().get_node_id(),
            line=StatusLine(status),
            report=ray.train.report,
            # Off in a Ray that a run started.
            watches_nodes=os.environ.get(ENABLE_PREEMPTION_WATCHER_ENV_VAR) != "0",
        )
