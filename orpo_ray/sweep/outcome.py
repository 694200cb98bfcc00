"""What a sweep leaves behind: a table of its trials, the best recipe, and a page."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.evaluation.pair_scores import read_whole_pair_scores
from orpo_ray.evaluation.summary import doubt_between
from orpo_ray.storage.run_folder import (
    BEST_RECIPE_FILE,
    EVAL_PAIRS_FILE,
    SWEEP_PAGE,
    TRIALS,
    TRIALS_TABLE,
    RunFolder,
)
from orpo_ray.sweep.page import render_sweep
from orpo_ray.sweep.record import STEP, Record, Trial
from orpo_ray.sweep.space import Space, with_params
from orpo_ray.training.launch import TrainingFailed

BEST = "-best"  # ends the name of the recipe that a sweep writes


@dataclass(frozen=True)
class Row:
    """One trial, as the table shows it."""

    name: str
    """Of its folder below `trials/`."""
    params: dict[str, str]
    """Recipe field -> value of this trial."""
    metric: float | None
    """Last value of `tune.metric`; None if the trial was never evaluated."""
    steps: int
    """Steps done at its last evaluation."""
    status: str
    """`finished`, `stopped early`, `replaced`, `interrupted` or `failed: ...`."""


@dataclass(frozen=True)
class Sweep:
    """The result of a search."""

    trials: list[Row]
    """All trials, best first."""
    best: str
    """Name of the best trial."""
    best_recipe: str
    """Path or URI of the recipe of the best trial."""
    doubt: str | None = None
    """Why the best trial may not be the best; None if the held-out pairs tell it from the next one."""
    page: str = ""
    """Path or URI of the page."""
    table: str = ""
    """Path or URI of the table of trials."""
    ended_by: str = ""
    """Why the search ended before its trials did; empty if it did not."""
    front: list[str] = field(default_factory=list)
    """With a second metric, names of the trials that no other one beats in both."""


def write_outcome(record: Record, space: Space, folder: RunFolder, ended_by: str = "") -> Sweep:
    """Write `trials.csv`, `best_recipe.yaml` and `sweep.html` into the folder of a sweep.

    Args:
        record: of the sweep.
        space: of the search.
        folder: of the sweep.
        ended_by: why it ended before its trials did; empty if it did not.

    Raises:
        TrainingFailed: no trial was evaluated.
    """
    ranked = record.ranked()
    write_table(record, space, folder)
    rows = [row_of(trial, record, space) for trial in ranked]
    if not ranked or ranked[0].value(record.tune.metric) is None:
        reasons = "; ".join(f"{row.name} {row.status}" for row in rows)
        raise TrainingFailed(f"no trial was evaluated: {'; '.join(filter(None, (ended_by, reasons)))}")
    best = ranked[0]
    text = with_params(record.recipe, best.params, f"{record.recipe.name}{BEST}").to_yaml()
    (folder.path / BEST_RECIPE_FILE).write_text(text, encoding="utf-8")
    doubt = _doubt(record, ranked)
    (folder.path / SWEEP_PAGE).write_text(render_sweep(record, space, doubt, ended_by), encoding="utf-8")
    folder.push(BEST_RECIPE_FILE)
    folder.push(SWEEP_PAGE)
    return Sweep(
        rows,
        best.name,
        f"{folder.uri}/{BEST_RECIPE_FILE}",
        doubt,
        f"{folder.uri}/{SWEEP_PAGE}",
        f"{folder.uri}/{TRIALS_TABLE}",
        ended_by,
        [trial.name for trial in record.front()],
    )


def row_of(trial: Trial, record: Record, space: Space) -> Row:
    """Return a trial as the table shows it."""
    status: str = trial.state
    if trial.error:
        status += f": {trial.error}"
    params = dict(zip(space.keys, space.labels(trial.params), strict=True))
    return Row(trial.name, params, trial.value(record.tune.metric), trial.step, status)


def write_table(record: Record, space: Space, folder: RunFolder) -> None:
    """Write `trials.csv`: a line for each trial, in order of number, with its values, its last metrics and its cost."""
    metrics = sorted({name for trial in record.trials for line in trial.history for name in line if "/" in name})
    columns = ["trial", *space.keys, "state", "error", STEP, "seconds", "cost", "parent", "parent_step", *metrics]
    with (folder.path / TRIALS_TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for trial in record.trials:
            cost = trial.own_seconds / 3600 * record.gpus_per_trial * record.price_per_hour
            writer.writerow(
                {"trial": trial.name, "state": trial.state, "error": trial.error, STEP: trial.step}
                | {"seconds": f"{trial.seconds:.1f}", "cost": f"{cost:.4f}" if record.price_per_hour else ""}
                | {"parent": "" if trial.parent is None else f"{trial.parent:04d}"}
                | {"parent_step": trial.parent_step or ""}
                | {key: _cell(trial.params[key]) for key in space.keys}
                | {name: "" if (value := trial.value(name)) is None else repr(value) for name in metrics}
            )
    folder.push(TRIALS_TABLE)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _doubt(record: Record, ranked: list[Trial]) -> str | None:
    """Compare the best trial with the next one that was evaluated to its end, pair by pair."""
    scored: list[tuple[str, Any]] = []
    for trial in ranked:
        if trial.state == "finished" and len(scored) < 2:
            pairs = read_whole_pair_scores(RunFolder(f"{record.recipe.run_uri}/{TRIALS}/{trial.name}"), EVAL_PAIRS_FILE)
            scored += [] if pairs is None else [(trial.name, pairs)]
    if len(scored) < 2 or scored[0][0] != ranked[0].name:
        return None
    return doubt_between(scored[0], scored[1], record.tune.metric)
