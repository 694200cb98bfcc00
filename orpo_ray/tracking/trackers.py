"""All trackers of a run. To add one: write its class in a new file and add it to TRACKERS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.bad_rows_file import BadRowsFile
from orpo_ray.tracking.generations import Generation, GenerationsFile
from orpo_ray.tracking.logger import Logger, TrackerError
from orpo_ray.tracking.metrics_file import MetricsFile
from orpo_ray.tracking.mlflow import MlflowLogger
from orpo_ray.tracking.tensorboard import TensorboardLogger
from orpo_ray.tracking.trackio import TrackioLogger
from orpo_ray.tracking.weights_and_biases import WandbLogger

TRACKERS: dict[str, type[Logger]] = {
    "metrics.jsonl": MetricsFile,
    "bad_rows.jsonl": BadRowsFile,
    "generations.jsonl": GenerationsFile,
    "wandb": WandbLogger,
    "tensorboard": TensorboardLogger,
    "mlflow": MlflowLogger,
    "trackio": TrackioLogger,
}


class MultiLogger:
    """Passes every call to all open trackers, of which the workers besides rank 0 have none.

    The only place that catches TrackerError: it warns once and drops the tracker, and the run goes on.

    Attributes:
        folder: the run folder, or its mirror, that trackers write to; None without trackers.
    """

    def __init__(self, warn: Callable[[str], None] = lambda text: None, folder: RunFolder | None = None) -> None:
        self.folder = folder
        self._loggers: dict[str, Logger] = {}
        self._warn = warn

    @classmethod
    def open(
        cls, recipe: Recipe, step: int, warn: Callable[[str], None], trackers: Mapping[str, type[Logger]] = TRACKERS
    ) -> MultiLogger:
        """Open every tracker that the recipe asks for.

        Args:
            recipe: the run's recipe.
            step: 0, or the step that the run resumes after.
            warn: receives one message for each tracker that fails.
            trackers: name -> class.
        """
        folder = RunFolder(recipe.run_uri)
        folder.make()
        multi = cls(warn, folder)
        for name, tracker in trackers.items():
            try:
                logger = tracker.open(recipe, folder, step)
            except TrackerError as error:
                multi._drop(name, error)
                continue
            if logger is not None:
                multi._loggers[name] = logger
        return multi

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of a step to every tracker."""
        self._each(lambda logger: logger.log(step, metrics))

    def log_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Log bad rows to every tracker."""
        self._each(lambda logger: logger.log_bad_rows(rows))

    def log_generations(self, step: int, generations: Sequence[Generation]) -> None:
        """Log a model's answers to every tracker."""
        self._each(lambda logger: logger.log_generations(step, generations))

    def flush(self) -> None:
        """Flush every tracker."""
        self._each(lambda logger: logger.flush())

    def close(self) -> None:
        """Close every tracker. Closing again does nothing."""
        self._each(lambda logger: logger.close())
        self._loggers = {}

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except TrackerError as error:
                self._drop(name, error)

    def _drop(self, name: str, error: TrackerError) -> None:
        self._loggers.pop(name, None)
        self._warn(f"tracker {name} failed and is off for the rest of this run: {error}")
