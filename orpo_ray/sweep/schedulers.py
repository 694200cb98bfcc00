"""Which trials end early: Tune's schedulers, told what earlier sessions measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orpo_ray.config.tune_schema import TuneConfig
from orpo_ray.sweep.board import Board
from orpo_ray.sweep.record import STEP, Trial

REDUCTION = 3
MEDIAN_OF = 3
"""Trials that the median needs at least."""
LONGER = REDUCTION**3
"""How much longer than the recipe's own run a trial may be, if the search changes its length."""


def make_scheduler(tune: TuneConfig, every: int, num_steps: int, is_length_fixed: bool, board: Board) -> TrialScheduler:
    """Return the scheduler of a sweep.

    Args:
        tune: how to search.
        every: steps between evaluations.
        num_steps: of a trial.
        is_length_fixed: whether all trials have that many.
        board: of the sweep.
    """
    grace = min(tune.grace_evals * every, num_steps)
    options: dict[str, Any] = {"time_attr": STEP, "metric": tune.metric, "mode": tune.direction, "grace_period": grace}
    if tune.scheduler == "asha":
        longest = num_steps if is_length_fixed else LONGER * num_steps
        scheduler = ASHAScheduler(max_t=longest, reduction_factor=REDUCTION, **options)
    elif tune.scheduler == "median":
        # Without a time slice that ends, Tune would pause a trial for others to begin, and a run cannot be paused.
        scheduler = MedianStoppingRule(min_samples_required=MEDIAN_OF, min_time_slice=math.inf, **options)
    elif tune.scheduler == "pbt":
        return PopulationScheduler(board)
    else:
        return FIFOScheduler()
    replay(scheduler, board.record.trials)
    return scheduler


def replay(scheduler: TrialScheduler, trials: Sequence[Trial]) -> None:
    """Tell a scheduler the evaluations of trials that ended in earlier sessions, so that it compares with them."""
    for trial in trials:
        if trial.is_over and trial.history:
            known: Any = EarlierTrial(trial_id=f"earlier-{trial.name}")
            scheduler.on_trial_add(None, known)
            for line in trial.history:
                if scheduler.on_trial_result(None, known, dict(line)) == TrialScheduler.STOP:
                    break


@dataclass(frozen=True)
class EarlierTrial:
    """A trial of an earlier session, with what Tune's schedulers tell trials apart by."""

    trial_id: str


class PopulationScheduler(FIFOScheduler):
    """Ends the trials that population-based training replaces. The searcher then offers their successors."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide after an evaluation."""
        number = trial.config["number"]
        if STEP not in result:
            return TrialScheduler.CONTINUE  # a report of a checkpoint
        self._board.result(number, result)
        return TrialScheduler.STOP if self._board.is_replaced(number) else TrialScheduler.CONTINUE
