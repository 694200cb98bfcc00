"""The record of a sweep: what every trial was given and has reached. An interrupted sweep goes on from this file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.tune_schema import TuneConfig, natural_mode
from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import SWEEP_FILE, RunFolder

State = Literal["running", "interrupted", "finished", "stopped early", "replaced", "failed"]
"""`interrupted`: not over, and no driver works on it. `replaced`: another trial goes on from a better checkpoint."""
VERSION = 1
# Of `tune`, what a sweep that goes on may change.
MAY_CHANGE = ("num_trials", "max_concurrent", "max_hours", "max_cost", "pack")
STEP = "step"


@dataclass
class Trial:
    """One trial."""

    number: int
    params: dict[str, Any]
    """Recipe field -> value of this trial."""
    state: State = "running"
    error: str = ""
    """Why it failed."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Of each evaluation: `step`, `seconds` since the trial began, and the metrics `eval/...`."""
    seconds: float = 0.0
    """For which it ran, over all sessions."""
    own_seconds: float = 0.0
    """Its part of them: trials that train side by side divide the time among them."""
    parent: int | None = None
    """Number of the trial from whose checkpoint it began."""
    parent_step: int = 0
    """Step of that checkpoint."""

    @property
    def name(self) -> str:
        """Name of its run folder, below `trials/`."""
        return f"{self.number:04d}"

    @property
    def step(self) -> int:
        """Step of its latest evaluation."""
        return int(self.history[-1][STEP]) if self.history else self.parent_step

    @property
    def is_over(self) -> bool:
        """Whether no driver needs to run it again."""
        return self.state not in ("running", "interrupted")

    def value(self, metric: str) -> float | None:
        """Return the latest value of a metric; None if it has none."""
        return next((line[metric] for line in reversed(self.history) if metric in line), None)

    def value_at(self, metric: str, step: int) -> float | None:
        """Return the value of a metric at a step; None if the trial was not evaluated there."""
        return next((line[metric] for line in self.history if line[STEP] == step and metric in line), None)


@dataclass
class Record:
    """All trials of a sweep, and the time and money that they took. Written after each change."""

    recipe: Recipe
    trials: list[Trial] = field(default_factory=list)
    seconds: float = 0.0
    """Wall-clock time of all sessions."""
    price_per_hour: float = 0.0
    """US$ of a GPU, for the cost; 0 on CPUs."""
    num_steps: int = 0
    """Steps of a trial that runs to its end."""
    gpus_per_trial: float = 0.0

    @property
    def tune(self) -> TuneConfig:
        """How the sweep searches."""
        return self.recipe.tune

    def trial(self, number: int) -> Trial:
        """Return a trial by number."""
        return self.trials[number]

    def new(self, params: Mapping[str, Any], parent: Trial | None = None, parent_step: int = 0) -> Trial:
        """Add a trial."""
        number = None if parent is None else parent.number
        trial = Trial(len(self.trials), dict(params), parent=number, parent_step=parent_step)
        self.trials.append(trial)
        return trial

    def ranked(self) -> list[Trial]:
        """Return the trials, best first; those without a value of the metric last.

        A trial that was stopped early has its value at fewer steps, so it comes after those that finished.
        """
        sign = -1.0 if self.tune.direction == "max" else 1.0

        def place(trial: Trial) -> tuple[bool, bool, float]:
            value = trial.value(self.tune.metric)
            return value is None, trial.state != "finished", 0.0 if value is None else sign * value

        return sorted(self.trials, key=place)

    def front(self) -> list[Trial]:
        """Return the trials that no other one beats in both metrics; empty without a second metric."""
        second = self.tune.second_metric
        if second is None:
            return []
        signs = [1.0 if mode == "max" else -1.0 for mode in (self.tune.direction, natural_mode(second))]
        scored = []
        for trial in self.trials:
            values = [trial.value(metric) for metric in (self.tune.metric, second)]
            if trial.state == "finished" and None not in values:
                scored.append((trial, [sign * float(value or 0.0) for sign, value in zip(signs, values, strict=True)]))
        return [
            trial
            for trial, own in scored
            if not any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for _, other in scored)
        ]

    @property
    def hours(self) -> float:
        """GPU hours of all trials."""
        return sum(trial.own_seconds for trial in self.trials) * self.gpus_per_trial / 3600

    @property
    def cost(self) -> float:
        """US$ of all trials."""
        return self.hours * self.price_per_hour

    def save(self, folder: RunFolder) -> None:
        """Write the record, as a whole or not at all. Raises OSError."""
        content = {
            "version": VERSION,
            "recipe": self.recipe.model_dump(mode="json"),
            "seconds": round(self.seconds, 3),
            "price_per_hour": self.price_per_hour,
            "num_steps": self.num_steps,
            "gpus_per_trial": self.gpus_per_trial,
            "trials": [asdict(trial) for trial in self.trials],
        }
        scratch = folder.path / f"{SWEEP_FILE}.tmp"
        scratch.write_text(json.dumps(content, allow_nan=False, indent=1), encoding="utf-8")
        scratch.replace(folder.path / SWEEP_FILE)
        folder.push(SWEEP_FILE)


def read_record(folder: RunFolder) -> Record | None:
    """Read the record of a sweep folder; None if there is none.

    Raises:
        UserError: another version wrote it, or it is damaged.
    """
    folder.pull(SWEEP_FILE)
    path = folder.path / SWEEP_FILE
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("version") != VERSION:
            raise ValueError("another version wrote it")
        trials = [Trial(**{"own_seconds": each["seconds"]} | each) for each in raw.pop("trials")]
        recipe = Recipe.model_validate(raw.pop("recipe"))
        return Record(recipe, trials, **raw)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the record of the sweep cannot be read: {str(error).splitlines()[0]}",
            field=f"{folder.uri}/{SWEEP_FILE}",
            fix="choose another name (name=...), or delete the folder",
        ) from None


def resume_or_begin(recipe: Recipe, folder: RunFolder) -> Record:
    """Return the record of the sweep that the folder holds, to go on with, or a new one.

    Trials that were running when their driver ended become `interrupted`; they run again under their names, from their
    checkpoints.

    Raises:
        UserError: the folder holds a sweep of another recipe.
    """
    found = read_record(folder)
    if found is None:
        return Record(recipe)
    differing = _differing(found.recipe.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if differing:
        raise UserError(
            f"the folder holds a sweep of another recipe; the two differ in {', '.join(differing)}",
            field=folder.uri,
            fix="choose another name (name=...), or delete the folder",
        )
    found.recipe = recipe
    for trial in found.trials:
        if not trial.is_over:
            trial.state = "interrupted"
    return found


def finite_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics `eval/...` of a report that are finite numbers."""
    return {
        name: float(value)
        for name, value in result.items()
        if name.startswith("eval/") and isinstance(value, int | float) and math.isfinite(value)
    }


def _differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two sweeps differ, other than those that do not change its trials."""
    found = []
    for section, values in now.items():
        if section in ("scaling", "checkpoint", "tracking", "synthesize"):
            continue
        before = saved.get(section)
        if not isinstance(values, dict) or not isinstance(before, dict):
            found += [section] if values != before else []
            continue
        for key, value in values.items():
            if before.get(key) != value and not (section == "tune" and key in MAY_CHANGE):
                found.append(f"{section}.{key}")
    return found
