"""The `Engine` protocol: what the training loop needs from an engine; and the engine of a recipe."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.packing import PairBatch
from orpo_ray.objective.logps import PairLogps


class Engine(Protocol):
    """One worker's handle on a model that all workers train together.

    An engine wraps a `PairModel`, its optimizer and its learning-rate schedule. Every method is a collective: all
    workers call it, in the same order. Only `learning_rate` and `checkpoint_bytes` may be read by one
    worker alone.
    """

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""

    @property
    def checkpoint_bytes(self) -> int:
        """About how many bytes `save` writes on this worker."""

    def forward(self, batch: PairBatch) -> PairLogps:
        """Run the model on a micro-batch. Under `torch.no_grad` and `model.eval()` it serves evaluation too."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradient. The step's gradient is the sum over micro-batches and workers."""

    def step(self) -> float:
        """Clip the gradient, update the weights, advance the schedule, and clear the gradient.

        If the gradient is not finite, the weights, the optimizer and the schedule stay as they are. The training
        program does not call it on an engine that has the methods of `ReducesApart`, which it calls instead.

        Returns:
            The norm of the whole gradient before clipping, equal on all workers.
        """

    def has_finite_weights(self) -> bool:
        """Whether every trained weight is finite, on all workers."""

    def save(self, folder: Path) -> None:
        """Write this worker's part of the state into a folder; the folders of all workers are merged afterwards.

        The state holds the trained weights, the optimizer and the schedule.
        """

    def load(self, folder: Path) -> None:
        """Load the state from a merged folder."""

    def consolidated_weights(self, trained_only: bool) -> dict[str, torch.Tensor]:
        """Gather the weights, one at a time, into the main memory of rank 0.

        Args:
            trained_only: leave out frozen parameters, which may be most of the model.

        Returns:
            The `PairModel`'s state dict on rank 0, with tied weights still tied; an empty one on other ranks.
        """


@runtime_checkable
class ReducesApart(Protocol):
    """What an engine adds if the gradient's norm can be read before the update, together with what the step logs.

    The training program then calls these two instead of `step`, which is `update_weights(float(reduce_gradient()))`.
    """

    def reduce_gradient(self) -> torch.Tensor:
        """Add up the gradient over workers and clip it. The host does not wait for the device.

        Returns:
            The norm of the whole gradient before clipping: a number on the device, equal on all workers.
        """

    def update_weights(self, norm: float) -> None:
        """Do the rest of a step: update the weights, advance the schedule, and clear the gradient.

        Args:
            norm: what `reduce_gradient` returned. If it is not finite, only the gradient is cleared.
        """


@runtime_checkable
class SavesAlone(Protocol):
    """What an engine adds if each worker holds the whole state. Any worker can then save it if another one is lost."""

    updates: int
    """Number of updates that this engine has made."""

    def save_alone(self, folder: Path, updates: int) -> bool:
        """Write the state from another thread than the one that trains, without the other workers.

        That thread may be in a collective that never ends, since a worker is lost. It makes no update after the state
        that was written: its process is about to be ended.

        Args:
            folder: where to write.
            updates: number of updates that the state must have.

        Returns:
            Whether it was written. Otherwise, the state has another number of updates, or a part of one, or a weight
            that is not finite.
        """


@runtime_checkable
class LoadsPart(Protocol):
    """What an engine adds if a worker reads a part of a checkpoint. Others are not downloaded from an object store."""

    def files_to_load(self, files: Collection[str], num_writers: int) -> list[str]:
        """Return the files that `load` reads on this worker.

        Args:
            files: paths of all files in the checkpoint.
            num_writers: number of workers that wrote the checkpoint.
        """


def make_engine(model: nn.Module, recipe: Recipe, num_steps: int, num_workers: int) -> Engine:
    """Return the engine of a recipe's ZeRO stage. A collective.

    Args:
        model: the `PairModel` to train, on this worker's device.
        recipe: the resolved recipe.
        num_steps: number of steps of the whole run, for the schedule.
        num_workers: number of workers that train together.
    """
    if recipe.deepspeed.zero_stage == 0:
        from orpo_ray.training.replicated_engine import ReplicatedEngine

        return ReplicatedEngine(model, recipe, num_steps, num_workers)
    # Importing DeepSpeed takes seconds.
    from orpo_ray.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, recipe, num_steps, num_workers)
