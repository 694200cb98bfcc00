"""Packs, the trials that train side by side on one model: whether a search has any, and how many trials each has."""

from __future__ import annotations

import ray

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.tune_schema import TuneConfig
from orpo_ray.errors import UserError
from orpo_ray.ray_cluster.start import on_this_node
from orpo_ray.streaming.pipeline import ENCODE_ENV
from orpo_ray.sweep.space import Space, with_params
from orpo_ray.training.side_by_side import why_not_side_by_side

MOST = 8
"""Trials of a pack that nobody chose a number for."""


def why_not_packed(recipe: Recipe, space: Space) -> str | None:
    """Say why trials of a search cannot train side by side; None if they can, as far as the recipe and its model tell.

    Asks a Ray task for the model.

    Raises:
        UserError: the model cannot be found or trained.
    """
    if recipe.tune.scheduler == "pbt":
        return "tune.scheduler is pbt, whose trials go on from each other's checkpoints"
    if recipe.eval.generate:
        return "eval.generate is not 0"
    if recipe.tracking.trackio.enabled:
        return "tracking.trackio is enabled, which has one run at a time in a process"
    first = {each.key: each.extremes()[0] for each in space}
    corners = [first] + [first | {each.key: value} for each in space for value in each.extremes()[1:]]
    if (why := why_not_side_by_side([with_params(recipe, params, recipe.name) for params in corners])) is not None:
        return why
    task = ray.remote(why_model_cannot).options(
        num_cpus=0, scheduling_strategy=on_this_node(), runtime_env=ENCODE_ENV, max_retries=0
    )
    try:
        found: str | None = ray.get(task.remote(with_params(recipe, first, recipe.name)))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return found


def why_model_cannot(recipe: Recipe) -> str | None:
    """Say why adapters cannot run side by side on the model of a recipe, by its config alone. Raises UserError."""
    import torch

    from orpo_ray.model.loading import load_config, pick_attention
    from orpo_ray.objective import multi_adapter
    from orpo_ray.objective.pair_model import PairModel
    from orpo_ray.planning.activations import NORM, unloaded_model

    config = load_config(recipe.model)
    attention = pick_attention(recipe.model, config)
    if attention.layout != "shared_prefix":
        return f"the model cannot share a prefix: {attention.why or 'model.attention is concatenated'}"
    # 4-bit layers hold the same adapters as those they replace.
    model_config = recipe.model.model_copy(update={"quantization": None})
    model = unloaded_model(model_config, config, torch.float32, attention.layout, "cpu")
    return multi_adapter.why_not_side_by_side(PairModel(model, NORM))


def wanted_size(tune: TuneConfig, num_trials: int, places: int) -> int:
    """Return how many trials would train side by side, if they can.

    Args:
        tune: section of the recipe.
        num_trials: number of trials.
        places: processes that the cluster has room for.
    """
    most = num_trials if tune.max_concurrent == "auto" else min(tune.max_concurrent, num_trials)
    if tune.pack == "off":
        return 1
    return min(-(-most // places), MOST) if tune.pack == "auto" else min(tune.pack, most)


def pack_size(recipe: Recipe, space: Space, num_trials: int, places: int, shares_rows: bool) -> int:
    """Return how many trials train side by side; 1 if none do.

    Args:
        recipe: of the sweep.
        space: of the sweep.
        num_trials: number of trials.
        places: processes that the cluster has room for.
        shares_rows: whether all trials read the same rows.

    Raises:
        UserError: the recipe asks for packs that are not possible, or its model cannot be trained.
    """
    wanted = recipe.tune.pack
    size = wanted_size(recipe.tune, num_trials, places)
    if size == 1 and wanted in ("auto", "off", 1):
        return 1
    why = why_not_packed(recipe, space) if shares_rows else "they read different rows"
    if why is None:
        return size
    if wanted == "auto":
        return 1
    problem = f"the trials of this search cannot train side by side: {why}"
    raise UserError(problem, field="tune.pack", value=wanted, fix="set it to auto")
