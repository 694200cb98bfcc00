"""What happens in a sweep, in one place: Tune's searcher, scheduler, stopper and callback tell and ask the board."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.sweep.population import Population
from orpo_ray.sweep.record import STEP, Record, Trial, finite_metrics
from orpo_ray.sweep.searchers import Sampler

INTERRUPTED = "it was interrupted"
"""Why a sweep ended that a signal ended."""
FINAL_KEY = "final"
"""Of the last report of a run."""


class Board:
    """State of a sweep that runs. Tune's thread writes; the display's thread reads.

    Args:
        record: of the sweep.
        folder: of the sweep.
        sampler: chooses values of new trials.
        together: number of trials at a time.
        num_trials: number of trials that begin at step 0.
        population: for population-based training.
        lost: gets an error when another process has taken over the sweep.

    Attributes:
        stopped_by: why the sweep ended before its trials did; empty if it did not.
    """

    def __init__(
        self,
        record: Record,
        folder: RunFolder,
        sampler: Sampler,
        together: int,
        num_trials: int,
        population: Population | None = None,
        lost: Sequence[Exception] = (),
    ) -> None:
        self.record, self.together, self.num_trials, self.stopped_by = record, together, num_trials, ""
        self._folder, self._sampler, self._population, self._lost = folder, sampler, population, lost
        self._waiting = [trial for trial in record.trials if trial.state == "interrupted"]
        self._counted: dict[int, float] = {}
        """Number of a running trial -> when its time was counted last."""
        self._packs: dict[int, frozenset[int]] = {}
        """Number of a trial -> numbers of those that train side by side with it, and its own."""
        self._final: set[int] = set()
        self._replaced: set[int] = set()
        self._began, self._before = time.monotonic(), record.seconds
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks and its search. Nothing reads these copies: a sweep resumes from its record.
        return {}

    @property
    def seconds(self) -> float:
        """Wall-clock time of the sweep, over all sessions."""
        return self._before + time.monotonic() - self._began

    @property
    def is_exhausted(self) -> bool:
        """Whether no trial is left to begin, now or later."""
        with self.lock:
            return bool(self.stopped_by) or (not self._waiting and not self._counted and not self._may_begin())

    @property
    def has_more(self) -> bool:
        """Whether a trial could begin if there were room, not counting those that running trials may lead to."""
        with self.lock:
            return not self.stopped_by and (bool(self._waiting) or self._may_begin())

    def next_trial(self) -> Trial | None:
        """Return the trial to run next; None if all slots are taken or none is left."""
        with self.lock:
            if self.stopped_by or len(self._counted) >= self.together:
                return None
            if self._waiting:
                trial = self._waiting.pop(0)
            elif not self._may_begin() or (params := self._sampler.ask(len(self.record.trials))) is None:
                return None
            else:
                trial = self.record.new(params)
            trial.state = "running"
            self._counted[trial.number] = time.monotonic()
            self.save()
            return trial

    def share(self, trials: Sequence[Trial]) -> None:
        """Note that trials which begin now train side by side."""
        numbers = frozenset(trial.number for trial in trials)
        self._packs |= dict.fromkeys(numbers, numbers)

    def result(self, number: int, report: Mapping[str, Any]) -> Trial:
        """Take an evaluation of a trial. A resumed trial repeats those after its checkpoint."""
        with self.lock:
            trial = self.record.trial(number)
            self._count(trial)
            metrics = finite_metrics(report)
            if STEP in report and metrics:
                step = int(report[STEP])
                trial.history = [line for line in trial.history if line[STEP] < step]
                trial.history.append({STEP: step, "seconds": round(trial.seconds, 3)} | metrics)
            if report.get(FINAL_KEY):
                self._final.add(number)
            self._sampler.tell(trial)
            self.save()
            return trial

    def is_replaced(self, number: int) -> bool:
        """Whether a trial that was evaluated just now ends, since another one goes on in its place."""
        with self.lock:
            trial = self.record.trial(number)
            if self._population is None or number in self._final:
                return False
            found = self._population.successor(trial)
            if found is None:
                return False
            successor = self.record.new(*found)
            successor.state = "interrupted"
            self._waiting.append(successor)
            self._replaced.add(number)
            return True

    def end(self, number: int, error: str | None = None) -> None:
        """Take the end of a trial.

        Args:
            number: of the trial.
            error: why it failed; None if it did not.
        """
        with self.lock:
            trial = self.record.trial(number)
            if number not in self._counted:
                return
            for other in self._packs.get(number, frozenset()):  # they divide the time among fewer from now on
                self._count(self.record.trial(other))
            self._count(trial)
            del self._counted[number]
            if error is not None:
                trial.state, trial.error = "failed", error
            elif number in self._final:
                trial.state = "finished"
            elif number in self._replaced:
                trial.state = "replaced"
            else:
                trial.state = "interrupted" if self.stopped_by else "stopped early"
            self._sampler.tell(trial)
            self.save()

    def close(self) -> None:
        """Mark the trials that Tune left as interrupted."""
        with self.lock:
            for number in list(self._counted):
                self.stopped_by = self.stopped_by or INTERRUPTED
                self.end(number)

    def should_stop(self) -> str | None:
        """Say why the sweep must end: a budget is spent, or the lease is lost; None if it need not."""
        with self.lock:
            for number in self._counted:
                self._count(self.record.trial(number))
            tune = self.record.tune
            if self._lost:
                return str(self._lost[0])
            if tune.max_hours is not None and self.seconds >= 3600 * tune.max_hours:
                return f"tune.max_hours ({tune.max_hours:g}) is reached"
            if tune.max_cost is not None and self.record.cost >= tune.max_cost:
                return f"tune.max_cost (${tune.max_cost:,.2f}) is spent"
            return None

    def save(self) -> None:
        """Write the record."""
        with self.lock:
            self.record.seconds = self.seconds
            self.record.save(self._folder)

    def _count(self, trial: Trial) -> None:
        if trial.number in self._counted:
            now = time.monotonic()
            seconds, self._counted[trial.number] = now - self._counted[trial.number], now
            running = self._packs.get(trial.number, frozenset()) & self._counted.keys()
            trial.seconds += seconds
            trial.own_seconds += seconds / max(1, len(running))

    def _may_begin(self) -> bool:
        return sum(trial.parent is None for trial in self.record.trials) < self.num_trials
