"""`orpo-ray tune`: a random search with Ray Tune and ASHA; every trial is a training run with its own run folder."""

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
from orpo_ray.evaluation.pair_scores import read_pair_scores
from orpo_ray.evaluation.summary import doubt_between
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.run_folder import BEST_RECIPE_FILE, EVAL_PAIRS_FILE, TRIALS, RunFolder
from orpo_ray.training.launch import TrainingFailed, launch_training, storage_of
from orpo_ray.training.placement import fitting_nodes
from orpo_ray.training.resources import worker_resources

# The driver of a trial only waits for its workers, so it leaves them the CPUs.
DRIVER_CPUS = 0.01
BEST = "-best"  # ends the name of the recipe that a sweep writes


@dataclass(frozen=True)
class Trial:
    """One trial, as the table shows it."""

    name: str
    """Tune's id of the trial."""
    params: dict[str, float]
    """Recipe field -> value of this trial."""
    metric: float | None
    """Last value of `tune.metric`; None if the trial was never evaluated."""
    steps: int
    """Steps done."""
    status: str
    """`finished`, `stopped early`, or `failed: ...`."""


@dataclass(frozen=True)
class Sweep:
    """The result of a search."""

    trials: list[Trial]
    """All trials, best first."""
    best: str
    """Name of the best trial."""
    best_recipe: str
    """Path or URI of the recipe of the best trial."""
    doubt: str | None = None
    """Why the best trial may not be the best; None if the held-out pairs tell it from the next one."""


def run_sweep(recipe: Recipe, console: Console) -> Sweep:
    """Run the search of the recipe's `tune` section; the run folders of the trials are in `<run folder>/trials/`.

    Raises:
        UserError: the search does not fit the objective, there are no held-out pairs, or the trials would fail on
            their data or do not fit the cluster.
        TrainingFailed: no trial was evaluated.
    """
    recipe = recipe.with_absolute_paths()
    section, search = recipe.tune, recipe.search
    _with_params(recipe, {}, f"{recipe.name}{BEST}")  # refuses a name that is too long for it before the trials run
    if not recipe.has_held_out:
        fix = "name held-out pairs in data.eval, or set data.eval_fraction"
        raise UserError("a search needs held-out pairs to rank its trials", field="data.eval", fix=fix)
    if not isinstance(recipe.scaling.num_workers, int):
        fix = "set one number; trials that run at the same time would take each other's workers"
        raise UserError(
            "a search needs a fixed number of workers",
            field="scaling.num_workers",
            value=recipe.scaling.num_workers,
            fix=fix,
        )
    # Check the data once before the trials start, since an error would make all of them fail.
    num_steps = -(-run_data(recipe)[0].end_sample // recipe.optim.pairs_per_step)
    # Tune would print a screenful every few seconds; `TrialLogger` prints one line per evaluation.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    start_ray(state_api=True)
    together = min(section.max_concurrent, section.num_trials)
    nodes = fitting_nodes(recipe.scaling, ray.nodes())
    reserved = together * DRIVER_CPUS
    resources = worker_resources(recipe, ray.cluster_resources(), runs=together, reserved=reserved, nodes=nodes)
    every = recipe.eval.every_steps or max(1, num_steps // 4)
    base = recipe.model_copy(
        update={
            "eval": recipe.eval.model_copy(update={"every_steps": every}),
            "scaling": recipe.scaling.model_copy(update={"cpus_per_worker": resources.cpus}),
        }
    )
    console.print(
        f"[bold]{recipe.name}[/bold]  {section.num_trials} trials of {num_steps:,} steps, {together} at a time; "
        f"{section.metric} every {every} steps",
        highlight=False,
        soft_wrap=True,
    )
    results = _tuner(base, search, num_steps, every, together).fit()
    trials = sorted((_trial(base, result) for result in results), key=lambda trial: _rank(trial, section.mode))
    if not trials or trials[0].metric is None:
        raise TrainingFailed("no trial was evaluated: " + "; ".join(f"{trial.name} {trial.status}" for trial in trials))
    best = trials[0]
    folder = RunFolder(recipe.run_uri)
    text = _with_params(recipe, best.params, f"{recipe.name}{BEST}").to_yaml()
    (folder.path / BEST_RECIPE_FILE).write_text(text, encoding="utf-8")
    folder.push(BEST_RECIPE_FILE)
    return Sweep(trials, best.name, f"{recipe.run_uri}/{BEST_RECIPE_FILE}", _doubt(recipe, trials))


def _doubt(recipe: Recipe, trials: list[Trial]) -> str | None:
    """Compare the best trial with the next one that was evaluated to its end, pair by pair."""
    scored = []
    for trial in trials:
        pairs = read_pair_scores(RunFolder(f"{recipe.run_uri}/{TRIALS}/{trial.name}"), EVAL_PAIRS_FILE)
        if pairs is not None:
            scored.append((trial.name, pairs))
    if len(scored) < 2 or scored[0][0] != trials[0].name:
        return None
    return doubt_between(scored[0], scored[1], recipe.tune.metric)


def _tuner(base: Recipe, search: dict[str, SearchRange], num_steps: int, every: int, together: int) -> tune.Tuner:
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
        param_space={key: _domain(values) for key, values in search.items()},
        tune_config=tune.TuneConfig(
            metric=section.metric,
            mode=section.mode,
            scheduler=scheduler,
            # Tune does not count the resources of the trials' workers, so this limits how many run at a time.
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
    """Prints one line for every evaluation of every trial."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if self.metric in result:
            line = f"{trial.trial_id}  step {result['step']}  {self.metric} {result[self.metric]:.4f}"
            # Made here because Tune pickles its callbacks and a console cannot be pickled.
            Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def _run_trial(params: dict[str, float], recipe: dict[str, Any]) -> None:
    """Train one trial under its own name and report its evaluations to Tune."""
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
