"""Run one trial: an ordinary training run in its own run folder, whose evaluations go to Tune."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from rich.console import Console

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.from_recipe import RunRows
from orpo_ray.storage.run_folder import TRIALS, RunFolder
from orpo_ray.sweep.board import FINAL_KEY
from orpo_ray.sweep.inherit import inherit_checkpoint
from orpo_ray.sweep.record import STEP, Trial, finite_metrics
from orpo_ray.sweep.space import Params, with_params
from orpo_ray.training.launch import RunSummary, launch_training


@dataclass(frozen=True)
class TrialSpec:
    """What a trial is given."""

    name: str
    """Of its run folder, below `trials/`."""
    params: Params
    """Recipe field -> value."""
    parent: str | None = None
    """Name of the trial from whose checkpoint it begins."""
    parent_step: int = 0
    """Step of that checkpoint."""

    @classmethod
    def of(cls, trial: Trial) -> TrialSpec:
        """Take it from the record."""
        parent = None if trial.parent is None else f"{trial.parent:04d}"
        return cls(trial.name, trial.params, parent, trial.parent_step)

    def as_config(self, number: int) -> dict[str, Any]:
        """Return the config of Tune's trial. Tune would look into nested values."""
        return {"number": number, "trial": json.dumps(asdict(self))}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TrialSpec:
        """Read the config of Tune's trial."""
        return cls(**json.loads(config["trial"]))


def run_trial(
    recipe: Recipe,
    spec: TrialSpec,
    callbacks: Sequence[Any] = (),
    data: RunRows | None = None,
    together: int = 1,
) -> RunSummary:
    """Train one trial to its end, or resume it.

    Args:
        recipe: of the sweep.
        spec: what the trial is given.
        callbacks: for Ray Train, such as Tune's.
        data: the rows of the run, if they are those of the sweep's recipe.
        together: number of trials that share the cluster.

    Raises:
        UserError: the trial's recipe, its data, model or cluster do not work.
        NoCheckpoint: the trial whose checkpoint it begins with has none.
        TrainingFailed: the run ended with an error.
    """
    changed = with_params(recipe, spec.params, f"{recipe.name}/{TRIALS}/{spec.name}")
    if spec.parent is not None:
        donor = RunFolder(f"{recipe.run_uri}/{TRIALS}/{spec.parent}")
        inherit_checkpoint(donor, spec.parent_step, RunFolder(changed.run_uri))
    return launch_training(changed, Console(quiet=True), callbacks=list(callbacks), data=data, together=together)


def trainable(config: dict[str, Any], recipe: dict[str, Any], data: RunRows | None, together: int) -> None:
    """Run a trial as Tune's function.

    Args:
        config: of Tune's trial, by `TrialSpec.as_config`.
        recipe: of the sweep, as a mapping.
        data: see `run_trial`.
        together: see `run_trial`.
    """
    spec = TrialSpec.from_config(config)
    summary = run_trial(parse_recipe(recipe), spec, [TuneReportCallback()], data, together)
    if summary.was_finished:  # its driver ended between the run's end and the record of it
        tune.report(finite_metrics(summary.metrics) | {STEP: summary.metrics[STEP], FINAL_KEY: True})
