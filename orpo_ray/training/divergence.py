"""Notice a run that diverges: count skipped updates, save no checkpoint meanwhile, and end the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from orpo_ray.errors import OrpoRayError, some_of

MAX_SKIPPED = 5
"""Skipped updates in a row that end a run."""
HIGH_FACTOR = 5.0
"""A loss is high above this many times the loss of the first step, or above this number if that was below 1."""
MAX_HIGH = 20
"""Steps in a row with a high loss that end a run."""
FIX = "lower optim.learning_rate or raise optim.warmup, and start a new run under another name (name=...)"


class TrainingDiverged(OrpoRayError):
    """The loss, the gradient or the weights of a run are not finite any longer, or the loss stays far too high."""


@dataclass
class DivergenceGuard:
    """Judges every step by numbers that all workers share, so that all of them decide alike."""

    first_loss: float = 0.0
    """Loss of the run's first step; 0 before that step."""
    skipped: int = 0
    """Updates skipped since the run began."""
    _skipped_in_a_row: int = field(default=0, init=False)
    _high_in_a_row: int = field(default=0, init=False)

    def observe(self, step: int, loss: float, grad_norm: float) -> bool:
        """Judge a step whose update the engine has made, or skipped because the gradient is not finite.

        Args:
            step: number of the step, from 1.
            loss: of the step.
            grad_norm: norm of its gradient, before clipping.

        Returns:
            Whether the update was skipped.

        Raises:
            TrainingDiverged: the run cannot recover.
        """
        was_skipped = not math.isfinite(grad_norm)
        self.skipped += was_skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if was_skipped else 0
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise TrainingDiverged(
                f"the gradient was not finite in {MAX_SKIPPED} steps in a row, the last one step {step:,}; the "
                f"checkpoint before is kept\n  fix: {FIX}"
            )
        if was_skipped:
            return True
        self.first_loss = self.first_loss or loss
        is_high = loss > HIGH_FACTOR * max(1.0, self.first_loss)
        self._high_in_a_row = self._high_in_a_row + 1 if is_high else 0
        if self._high_in_a_row >= MAX_HIGH:
            raise TrainingDiverged(
                f"the loss is {loss:.4g} at step {step:,} and was {self.first_loss:.4g} at first; it has been far "
                f"above that for {MAX_HIGH} steps, and the checkpoint before them is kept\n  fix: {FIX}"
            )
        return False

    @property
    def is_healthy(self) -> bool:
        """Whether the latest step was good, so that a checkpoint is worth keeping."""
        return not self._skipped_in_a_row and not self._high_in_a_row


def all_finite(weights: Iterable[torch.Tensor]) -> bool:
    """Whether every element of some tensors is finite. One wait for the device."""
    # A sum is finite only if all its terms are.
    sums = [weight.detach().sum(dtype=torch.float32) for weight in weights]
    return not sums or bool(torch.stack(sums).isfinite().all())


def skipped_message(step: int, ids: Sequence[str]) -> str:
    """Return the warning about a skipped update.

    Args:
        step: number of the step, from 1.
        ids: of the pairs whose loss was not finite, or of all pairs of the step if every loss was.
    """
    return f"step {step:,}: the gradient is not finite, so the update was skipped; pairs: {some_of(ids)}"
