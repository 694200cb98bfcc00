"""Ray Tune around the trials of a sweep. Tune starts and stops them; the board knows and decides the rest."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.from_recipe import RunRows
from orpo_ray.sweep.board import Board
from orpo_ray.sweep.budget import BudgetStopper
from orpo_ray.sweep.concurrency import DRIVER_CPUS
from orpo_ray.sweep.host import HOST, hosted_trainable
from orpo_ray.sweep.hosts import Hosts
from orpo_ray.sweep.live import SweepDisplay
from orpo_ray.sweep.record import STEP, Trial
from orpo_ray.sweep.trial_run import TrialSpec, trainable
from orpo_ray.training.launch import storage_of

TUNE = ".tune"
"""Folder in the run folder of a sweep where Tune writes what nobody reads."""
UNLIMITED = 1_000_000
"""Trials, for Tune; the board says when there are no more."""
TRACEBACKS = ("Traceback", "ray::", "Failure #")
# Tune would print a screenful every few seconds; and it would refuse reports without the metric, as those of a
# checkpoint are.
VARIABLES = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}
SLOW_STEPS = "ray.tune.utils.util"
"""The logger with which Tune warns of its own slowness, as on a busy machine."""
WAYS_ON = "ray.tune.tune"
"""The logger with which Tune says how to go on with a search, which does not work here."""


def run_trials(
    recipe: Recipe,
    board: Board,
    scheduler: TrialScheduler,
    data: RunRows | None,
    display: SweepDisplay,
    hosts: Hosts | None = None,
) -> None:
    """Run the trials of a sweep until none is left or a budget is spent.

    Args:
        recipe: of the sweep, with what all trials have in common filled in.
        board: of the sweep.
        scheduler: ends trials early.
        data: the rows of the trials; None if they differ.
        display: shows them.
        hosts: the processes of the trials; None if each has its own, which Ray Train starts.
    """
    os.environ.update(VARIABLES)
    logging.getLogger(SLOW_STEPS).setLevel(logging.ERROR)
    logging.getLogger(WAYS_ON).setLevel(logging.CRITICAL)
    function = hosted_trainable
    if hosts is None:
        function = tune.with_parameters(
            trainable, recipe=recipe.model_dump(mode="json"), data=data, together=board.together
        )
    tuner = tune.Tuner(
        tune.with_resources(function, {"cpu": DRIVER_CPUS}),
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            search_alg=BoardSearcher(board, hosts),
            num_samples=UNLIMITED,
            trial_name_creator=lambda trial: f"trial-{trial.config['number']:04d}",
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            **storage_of(recipe.model_copy(update={"name": f"{recipe.name}/{TUNE}"})),
            verbose=0,
            log_to_file=False,
            stop=BudgetStopper(board),
            callbacks=[Watch(board, display, hosts)],
        ),
    )
    try:
        tuner.fit()
    finally:
        if hosts is not None:
            hosts.close()
    board.close()


class BoardSearcher(Searcher):
    """Offers Tune the trials of the board, as many as the cluster has room for; Tune does not count their workers."""

    def __init__(self, board: Board, hosts: Hosts | None) -> None:
        super().__init__()
        self._board, self._hosts = board, hosts
        self._ready: list[tuple[Trial, dict[str, str]]] = []
        """Trials that have begun for the board, and not for Tune; and what their config has besides."""

    def suggest(self, trial_id: str) -> Any:
        """Return the config of the next trial, None to wait, or that there are no more."""
        if not self._ready:
            self._ready = self._next()
        if self._ready:
            trial, options = self._ready.pop(0)
            return TrialSpec.of(trial).as_config(trial.number) | options
        return Searcher.FINISHED if self._board.is_exhausted else None

    def _next(self) -> list[tuple[Trial, dict[str, str]]]:
        """Let the next trial, or all trials of the next group, begin."""
        hosts = self._hosts
        if hosts is not None and not hosts.find_place():
            return []
        trials: list[Trial] = []
        while len(trials) < (1 if hosts is None else hosts.size) and (trial := self._board.next_trial()) is not None:
            trials.append(trial)
        if hosts is not None and not trials and not self._board.has_more:
            hosts.end_free()
        options: dict[str, str] = {}
        if hosts is not None and trials:
            options[HOST] = hosts.start(trials)
            self._board.share(trials)
        return [(trial, options) for trial in trials]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: `Watch` tells the board."""

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file where Tune wants its state: the record is what a sweep resumes from."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing; see `save`."""


class Watch(tune.Callback):
    """Tells the board and the display what happens to the trials."""

    def __init__(self, board: Board, display: SweepDisplay, hosts: Hosts | None) -> None:
        self._board, self._display, self._hosts = board, display, hosts

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, and a console cannot be pickled

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial begins."""
        self._display.began(trial.config["number"])

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A trial reports: an evaluation, or a checkpoint."""
        number = trial.config["number"]
        self._board.result(number, result)
        if STEP in result:
            self._display.evaluated(number)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial is over, or was stopped."""
        self._end(trial, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial failed."""
        self._end(trial, error_text(trial))

    def _end(self, trial: Any, error: str | None) -> None:
        if self._hosts is not None:
            self._hosts.leave(trial.config["number"])
        self._board.end(trial.config["number"], error)
        self._display.ended(trial.config["number"])


def error_text(trial: Any) -> str:
    """Return the first line of what a trial's error says, without the traceback that Ray puts before it.

    Tune copies the errors of trials to the storage later, so this reads the file that it has written on this machine.

    Args:
        trial: Tune's trial, after its error.
    """
    file = trial.error_file
    if file is None:
        return "its process ended"
    return last_message(Path(file).read_text(encoding="utf-8", errors="replace"))


def last_message(text: str) -> str:
    """Return the first line of the last message in a text with tracebacks."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line[0].isalpha() and not line.startswith(TRACEBACKS)]
    return re.sub(r"^(\w+\.)+", "", said[-1]) if said else "its process ended"
