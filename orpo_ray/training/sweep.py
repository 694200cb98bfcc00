"""Ray Tune around `launch_training`: random search over beta and learning rate, ASHA, one run folder a trial."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator
from rich.console import Console

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import SearchRange
from orpo_ray.data.from_recipe import run_data
from orpo_ray.errors import UserError
from orpo_ray.ray_cluster import start_ray
from orpo_ray.storage.run_folder import BEST_RECIPE_FILE, TRIALS, RunFolder
from orpo_ray.training.launch import TrainingFailed, launch_training, storage_of
from orpo_ray.training.resources import worker_resources

# A trial's driver only waits for its workers; it must leave them their CPUs.
DRIVER_CPUS = 0.01


@dataclass(frozen=True)
class Trial:
    """One trial as the table shows it. metric: None if it never got to an evaluation."""

    name: str
    params: dict[str, float]
    metric: float | None
    steps: int
    status: str


@dataclass(frozen=True)
class Sweep:
    """All trials, best first, and where the recipe of the best one is."""

    trials: list[Trial]
    best: str
    best_recipe: str


def run_sweep(recipe: Recipe, console: Console) -> Sweep:
    """Search as `tune` says; every trial is an ordinary run in `<run folder>/trials/`. Raises UserError."""
    recipe = recipe.with_absolute_paths()
    section = recipe.tune
    if not recipe.has_held_out:
        raise UserError("a search ranks its trials on held-out pairs", field="data.eval", fix="give held-out pairs")
    # Everything that would make all trials fail alike is asked first, once.
    num_steps = -(-run_data(recipe)[0].end_sample // recipe.optim.pairs_per_step)
    # Tune's own report is a screenful for every few seconds; the lines of `TrialLogger` and the table say what matters.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    start_ray()
    together = min(section.max_concurrent, section.num_trials)
    share = worker_resources(recipe, ray.cluster_resources(), runs=together, reserved=together * DRIVER_CPUS)
    every = recipe.eval.every_steps or max(1, num_steps // 4)
    base = recipe.model_copy(
        update={
            "eval": recipe.eval.model_copy(update={"every_steps": every}),
            "scaling": recipe.scaling.model_copy(update={"cpus_per_worker": share.cpus}),
        }
    )
    console.print(
        f"[bold]{recipe.name}[/bold]  {section.num_trials} trials, {together} at a time, of {num_steps:,} steps each; "
        f"{section.metric} every {every}",
        highlight=False,
        soft_wrap=True,
    )
    results = _tuner(base, num_steps, every, together).fit()
    trials = sorted((_trial(base, result) for result in results), key=lambda trial: _rank(trial, section.mode))
    if not trials or trials[0].metric is None:
        raise TrainingFailed(f"no trial got to an evaluation: {[trial.status for trial in trials]}")
    best = trials[0]
    folder = RunFolder(recipe.run_uri)
    text = _with_params(recipe, best.params, f"{recipe.name}-best").to_yaml()
    (folder.path / BEST_RECIPE_FILE).write_text(text, encoding="utf-8")
    folder.push(BEST_RECIPE_FILE)
    return Sweep(trials, best.name, f"{recipe.run_uri}/{BEST_RECIPE_FILE}")


def _tuner(base: Recipe, num_steps: int, every: int, together: int) -> tune.Tuner:
    section = base.tune
    scheduler: TrialScheduler = FIFOScheduler()
    if section.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="step",
            max_t=num_steps,
            grace_period=min(section.grace_evals * every, num_steps),
            reduction_factor=3,
        )
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_run_trial, recipe=base.model_dump(mode="json")), {"cpu": DRIVER_CPUS}
        ),
        param_space={key: _domain(search) for key, search in base.search.items()},
        tune_config=tune.TuneConfig(
            metric=section.metric,
            mode=section.mode,
            scheduler=scheduler,
            # Tune does not see the trainers' placement groups, so it must be told how many fit.
            search_alg=BasicVariantGenerator(max_concurrent=together, random_state=section.seed),
            num_samples=section.num_trials,
            trial_dirname_creator=lambda trial: f"tune-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            **storage_of(base),
            verbose=0,
            log_to_file=False,
            callbacks=[TrialLogger(section.metric)],
        ),
    )


class TrialLogger(tune.Callback):
    """One line on the console for every evaluation of every trial."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if self.metric in result:
            shown = f"{trial.trial_id}  step {result['step']}  {self.metric} {result[self.metric]:.4f}"
            # Made here, since Tune pickles its callbacks and a console cannot be.
            Console(stderr=True).print(shown, highlight=False, soft_wrap=True)


def _run_trial(params: dict[str, float], recipe: dict[str, Any]) -> None:
    """One trial's driver: the same training under the trial's own name, reporting its evaluations to Tune."""
    parsed = parse_recipe(recipe)
    name = f"{parsed.name}/{TRIALS}/{tune.get_context().get_trial_id()}"
    launch_training(_with_params(parsed, params, name), Console(quiet=True), callbacks=[TuneReportCallback()])


def _with_params(recipe: Recipe, params: dict[str, float], name: str) -> Recipe:
    raw = recipe.model_dump(mode="json") | {"name": name}
    for key, value in params.items():
        section, _, field = key.partition(".")
        raw[section][field] = value
    return parse_recipe(raw)


def _domain(search: SearchRange) -> Any:
    if search.choices:
        return tune.choice(search.choices)
    assert search.low is not None
    assert search.high is not None
    return (tune.loguniform if search.log else tune.uniform)(search.low, search.high)


def _trial(base: Recipe, result: Any) -> Trial:
    metrics = result.metrics or {}
    if result.error is not None:
        status = f"failed: {str(result.error).strip().splitlines()[-1]}"
    else:
        status = "finished" if metrics.get("done") and "final" in metrics else "stopped early"
    config = result.config or {}
    return Trial(
        name=str(metrics.get("trial_id", Path(result.path).name)),
        params={key: config[key] for key in base.search},
        metric=metrics.get(base.tune.metric),
        steps=int(metrics.get("step", 0)),
        status=status,
    )


def _rank(trial: Trial, mode: str) -> float:
    if trial.metric is None:
        return float("inf")
    return -trial.metric if mode == "max" else trial.metric
