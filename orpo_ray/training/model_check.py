"""Check a recipe's model beside the start of the workers, in a process that goes on to encode pairs."""

from __future__ import annotations

import ray

from orpo_ray.config.recipe import Recipe
from orpo_ray.ray_cluster.start import on_this_node
from orpo_ray.streaming.pipeline import ENCODE_ENV


def start_model_check(recipe: Recipe, saved: Recipe | None) -> ray.ObjectRef:
    """Start `check_model` in a Ray task on this node.

    The task has the environment of the encoding tasks, so that Ray gives its process, which has imported torch and
    transformers for the check, to the first of them.
    """
    task = ray.remote(check_model).options(
        num_cpus=0,
        scheduling_strategy=on_this_node(),
        runtime_env=ENCODE_ENV,
        max_retries=0,
    )
    reference: ray.ObjectRef = task.remote(recipe, saved)
    return reference


def check_model(recipe: Recipe, saved: Recipe | None) -> tuple[Recipe, str | None]:
    """Pin the model's revision. Also return the line about a model that cannot share prefixes, or None.

    Args:
        recipe: the recipe to run.
        saved: the recipe of the run so far; None for a new run.

    Raises:
        UserError: the model cannot be found or trained.
    """
    from orpo_ray.model.loading import check_divisible, concatenated_because, pick_attention
    from orpo_ray.training.run_identity import pinned

    recipe = pinned(recipe, saved)
    if recipe.scaling.sequence_parallel > 1:
        check_divisible(recipe.model, recipe.scaling.sequence_parallel)
    why = pick_attention(recipe.model).why
    return recipe, concatenated_because(why) if why else None
