"""What a run keeps of its steps: how far it is, what was logged, and which bad rows it met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BAD_ROWS_SHOWN, BadRow, check_bad_fraction, refuse_rows
from orpo_ray.data.order import step_samples
from orpo_ray.data.reading import ReadSpec
from orpo_ray.evaluation.evaluator import Scores, with_prefix
from orpo_ray.objective.step_planner import StepPlan
from orpo_ray.tracking.trackers import MultiLogger
from orpo_ray.training.checkpoint import Position
from orpo_ray.training.divergence import DivergenceGuard
from orpo_ray.training.unlogged import LogLine


class RunBooks:
    """The books of one run. Every worker keeps them; only the first one's trackers write anything.

    Args:
        recipe: of the run.
        read: its training rows.
        num_steps: of the whole run.
        position: where it is.
        tracker: its trackers.
        tell: takes what the driver should show.

    Attributes:
        position: where the run is. Replaced as a whole, so that another thread may read it.
        unlogged: what was logged since the last checkpoint.
        guard: watches its losses.
    """

    def __init__(
        self,
        recipe: Recipe,
        read: ReadSpec,
        num_steps: int,
        position: Position,
        tracker: MultiLogger,
        tell: Callable[..., None],
    ) -> None:
        self._recipe, self._read, self._num_steps, self._tell = recipe, read, num_steps, tell
        self.position, self.tracker = position, tracker
        self.guard = DivergenceGuard(position.first_loss, position.skipped)
        self.unlogged: list[LogLine] = []
        self._first_bad: list[BadRow] = []
        self._shown: dict[str, Any] = {}

    def advance(self, plan: StepPlan, metrics: dict[str, float], figures: dict[str, float]) -> None:
        """Move the position past a step.

        Args:
            plan: the step.
            metrics: what the step measured, without a prefix; `epoch` is added.
            figures: further metrics, which the driver does not show.
        """
        _, end_sample = step_samples(plan.step, self._recipe.optim.pairs_per_step, self._read.end_sample)
        metrics |= {"epoch": end_sample / self._read.order.num_rows}
        old, bad = self.position, len(plan.bad)
        self.unlogged.append(LogLine(plan.step + 1, with_prefix(metrics | figures, "train"), plan.bad))
        self._shown = metrics
        self.position = replace(
            old,
            step=plan.step + 1,
            bad=old.bad + bad,
            seen=old.seen + bad + plan.pairs,
            skipped=self.guard.skipped,
            first_loss=self.guard.first_loss,
        )

    def log_step(self, bad: list[BadRow]) -> None:
        """Log the step that `advance` finished, and handle its bad rows. Raises UserError if they end the run."""
        if bad:
            self.tracker.log_bad_rows(bad)
            self._first_bad = [*self._first_bad, *bad][:BAD_ROWS_SHOWN]
            refuse_rows(self._recipe, bad)
        line = self.unlogged[-1]
        self.tracker.log(line.step, line.metrics)
        self._tell(phase="training", step=line.step, num_steps=self._num_steps, **self._shown)
        self.judge_bad_rows(at_end=False)

    def log_evaluation(self, scores: Scores) -> None:
        """Log the scores of held-out pairs."""
        line = LogLine(self.position.step, with_prefix(scores.metrics, "eval"), scores.bad)
        self.unlogged.append(line)
        self.tracker.log_bad_rows(line.bad)
        self.tracker.log(line.step, line.metrics)

    def saved(self, step: int) -> None:
        """Forget what a whole checkpoint holds."""
        self.unlogged = [line for line in self.unlogged if line.step > step]

    def judge_bad_rows(self, at_end: bool) -> None:
        """Raises UserError if too many rows are bad."""
        check_bad_fraction(self._recipe, self.position.bad, self.position.seen, self._first_bad, at_end)
