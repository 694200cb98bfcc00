"""The protocol that every tracker implements: the calls that a run makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Self

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.errors import OrpoRayError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.generations import Generation


class TrackerError(OrpoRayError):
    """A tracker's service failed. The run continues without that tracker."""


class Logger(Protocol):
    """One tracker. Rank 0 opens it and makes all calls.

    A method raises TrackerError when the tracker's service fails; `MultiLogger` then drops the tracker. Any other
    exception ends the run.
    """

    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, step: int) -> Self | None:
        """Open the tracker for a run that starts (step 0) or resumes after `step`.

        An attempt that died may have logged later steps; they are logged again, so the tracker drops or replaces them.

        Returns:
            The tracker, or None if the recipe does not ask for it.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics (`train/...`, `eval/...`) of a step. Steps never decrease; one step may be logged twice."""

    def log_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Log bad rows. A row comes once per epoch, and again after a resume."""

    def log_generations(self, step: int, generations: Sequence[Generation]) -> None:
        """Log the model's answers to held-out pairs, once per evaluation if the recipe has `eval.generate`."""

    def flush(self) -> None:
        """Store everything logged so far where it survives this machine. Called before every checkpoint."""

    def close(self) -> None:
        """Flush and release everything. No call follows."""
