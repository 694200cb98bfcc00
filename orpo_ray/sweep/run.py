"""`orpo-ray tune`: search the fields of a recipe; every trial is a training run with its own run folder.

From the top: check the space and the data, divide the cluster, run the trials under Ray Tune, write the outcome.
"""

from __future__ import annotations

from collections.abc import Sequence

import ray
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.tune_schema import GROUNDING_GAP
from orpo_ray.data.from_recipe import run_data
from orpo_ray.errors import UserError
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.lease import Lease, LeaseLost
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.sweep.board import Board
from orpo_ray.sweep.budget import price_of
from orpo_ray.sweep.concurrency import divide_cluster, places
from orpo_ray.sweep.hosts import Hosts, can_be_hosted
from orpo_ray.sweep.live import SweepDisplay
from orpo_ray.sweep.outcome import BEST, Sweep, write_outcome
from orpo_ray.sweep.packs import pack_size
from orpo_ray.sweep.population import Population, check_population
from orpo_ray.sweep.record import Record, resume_or_begin
from orpo_ray.sweep.schedulers import make_scheduler
from orpo_ray.sweep.searchers import make_sampler
from orpo_ray.sweep.space import Space, make_space, trials_to_begin, with_params
from orpo_ray.sweep.tuner import run_trials
from orpo_ray.training.placement import fitting_nodes

EVALUATIONS = 4
"""Of a trial, if the recipe does not say how often."""
# Rewards are beta times log-probs, and the terms of a loss have weights.
FACTORS = {
    "eval/rewards/margins": ("beta",),
    "eval/loss": ("beta", "image_beta", "anchor", "cpo_alpha", "gamma", "label_smoothing"),
}
"""Metric -> options of objectives that change the metric of one and the same model."""
# Fields that decide which rows a trial reads. Trials that differ in none of them share what was read and checked once.
DECIDES_ROWS = ("optim.epochs", "optim.max_steps", "optim.pairs_per_step", "orpo.image_beta", "orpo.other_image")


def run_sweep(recipe: Recipe, console: Console, prices: Sequence[str] = ()) -> Sweep:
    """Run the search of the recipe's `tune` section, or go on with one that was interrupted.

    The run folders of the trials are in `<run folder>/trials/`.

    Args:
        recipe: the recipe.
        console: where to print.
        prices: of GPUs, as in `orpo-ray plan --price-per-hour`.

    Raises:
        UserError: the search does not fit the recipe, there are no held-out pairs, the trials would fail on their data
            or do not fit the cluster, or another process runs this sweep.
        TrainingFailed: no trial was evaluated.
    """
    recipe = recipe.with_absolute_paths()
    space = _checked_space(recipe)
    # Check the data once before the trials start, since an error would make all of them fail.
    data = run_data(recipe)
    num_steps = -(-data[0].end_sample // recipe.optim.pairs_per_step)
    every = recipe.eval.every_steps or max(1, num_steps // EVALUATIONS)
    shares_rows = not any(key.startswith("data.") or key in DECIDES_ROWS for key in space.keys)
    num_trials = trials_to_begin(recipe, space)
    folder = RunFolder(recipe.run_uri)
    if _is_over(record := resume_or_begin(recipe, folder), num_trials):
        console.print("This sweep is over already. More trials: tune.num_trials=...", highlight=False)
        return write_outcome(record, space, folder)
    start_ray(state_api=True)
    nodes = fitting_nodes(recipe.scaling, ray.nodes())
    cluster = ray.cluster_resources()
    size = pack_size(recipe, space, num_trials, places(recipe, cluster, nodes), shares_rows)
    together, resources = divide_cluster(recipe, num_trials, cluster, nodes, size)
    gpus = resources.gpus * recipe.scaling.max_workers
    price = price_of(recipe.tune, prices, nodes, gpus)
    folder.make()
    lost: list[LeaseLost] = []
    with Lease(folder, on_lost=lost.append, wait=console.print):
        record = resume_or_begin(recipe, folder)
        record.num_steps, record.gpus_per_trial, record.price_per_hour = num_steps, gpus, price
        sampler = make_sampler(recipe.tune, space, recipe.name, folder, record.trials)
        population = Population(space, record) if recipe.tune.scheduler == "pbt" else None
        limit = recipe.tune.max_concurrent
        at_a_time = min(together * size, num_trials if limit == "auto" else limit)
        board = Board(record, folder, sampler, at_a_time, num_trials, population, lost)
        console.print(_headline(board, every, size), highlight=False, soft_wrap=True)
        if why := why_not_comparable(recipe.tune.metric, space.keys):
            console.print(f"[yellow]warning:[/yellow] {why}", highlight=False, soft_wrap=True)
        scheduler = make_scheduler(recipe.tune, every, num_steps, shares_rows, board)
        base = _base(recipe, every, resources.cpus, num_steps)
        hosts = None
        if can_be_hosted(recipe, space, shares_rows):
            hosts = Hosts(base, data, num_steps, size, together, resources)
        with SweepDisplay(board, space, recipe.run_uri, console) as display:
            run_trials(base, board, scheduler, data if shares_rows else None, display, hosts)
        if lost:
            raise lost[0]
        return write_outcome(record, space, folder, board.stopped_by)


def _checked_space(recipe: Recipe) -> Space:
    """Return the space of a search that can run. Raises UserError."""
    space = make_space(recipe)
    with_params(recipe, {}, f"{recipe.name}{BEST}")  # refuses a name that is too long for it before the trials run
    if not recipe.has_held_out:
        fix = "name held-out pairs in data.eval, or set data.eval_fraction"
        raise UserError("a search needs held-out pairs to rank its trials", field="data.eval", fix=fix)
    if "data.train" in space.keys and recipe.data.eval_fraction:
        raise UserError(
            "trials that hold out pairs of different data cannot be compared",
            field="tune.search",
            value="data.train",
            fix="name the held-out pairs in data.eval instead of data.eval_fraction",
        )
    if not isinstance(recipe.scaling.num_workers, int):
        fix = "set one number; trials that run at the same time would take each other's workers"
        raise UserError(
            "a search needs a fixed number of workers",
            field="scaling.num_workers",
            value=recipe.scaling.num_workers,
            fix=fix,
        )
    if GROUNDING_GAP in (recipe.tune.metric, recipe.tune.second_metric) and not recipe.eval.grounding:
        raise UserError(
            f"the search needs {GROUNDING_GAP}, which is not measured", field="eval.grounding", fix="set it to true"
        )
    if recipe.tune.scheduler == "pbt":
        check_population(recipe, space)
    return space


def why_not_comparable(metric: str, keys: Sequence[str]) -> str | None:
    """Say which searched fields change the metric of one and the same model; None if none does.

    Args:
        metric: that ranks the trials.
        keys: the fields that are searched.
    """
    changing = [key for key in keys if key.rpartition(".")[2] in FACTORS.get(metric, ())]
    if not changing:
        return None
    return (
        f"{metric} depends on {' and '.join(changing)} by its definition, so a trial can rank higher without having "
        "learned more; to compare trials, set tune.metric to eval/rewards/accuracies"
    )


def _is_over(record: Record, num_trials: int) -> bool:
    """Whether all trials of a sweep are over."""
    begun = sum(trial.parent is None for trial in record.trials)
    return begun >= num_trials and all(trial.is_over for trial in record.trials)


def _base(recipe: Recipe, every: int, cpus: float, num_steps: int) -> Recipe:
    """Fill in what all trials have in common."""
    checkpoint = recipe.checkpoint
    if recipe.tune.scheduler == "pbt":  # a trial may go on from any evaluation of another one
        kept = {"every_steps": every, "keep": max(checkpoint.keep, num_steps // every + 1)}
        checkpoint = checkpoint.model_copy(update=kept)
    return recipe.model_copy(
        update={
            "eval": recipe.eval.model_copy(update={"every_steps": every}),
            "scaling": recipe.scaling.model_copy(update={"cpus_per_worker": cpus}),
            "checkpoint": checkpoint,
        }
    )


def _headline(board: Board, every: int, size: int) -> str:
    record, tune = board.record, board.record.tune
    earlier = f"; goes on after {sum(trial.is_over for trial in record.trials)} of them" if record.trials else ""
    packed = f", up to {size} on one model" if size > 1 else ""
    metrics = tune.metric + (f" and {tune.second_metric}" if tune.second_metric else "")
    return (
        f"[bold]{record.recipe.name}[/bold]  {board.num_trials} trials of {record.num_steps:,} steps, {board.together} "
        f"at a time{packed}, by {tune.searcher} search with {tune.scheduler}; {metrics} every {every} steps{earlier}"
    )
