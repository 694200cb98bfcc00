"""A warning at a run's start where `model.vision_cache` makes it slower."""

from __future__ import annotations

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.planning.gpus import gpu_named


def slow_cache(recipe: Recipe, device: torch.device) -> str | None:
    """Return a warning if this GPU computes image features faster than they are read, by the plan's figures."""
    if recipe.model.vision_cache is None or device.type != "cuda":
        return None
    return slow_cache_on(recipe, torch.cuda.get_device_name(device))


def slow_cache_on(recipe: Recipe, name: str) -> str | None:
    """The same for a GPU of this name; None for a GPU type or a model that plans do not know."""
    gpu = gpu_named(name)
    if gpu is None:
        return None
    # Imported here because it imports torch's tracing, which takes time that other runs need not spend.
    from orpo_ray.planning.cached_features import warning_of_run
    from orpo_ray.planning.inputs import can_plan
    from orpo_ray.planning.plan import load_config

    try:
        config, _ = load_config(recipe.model)
        return warning_of_run(recipe, config, gpu) if can_plan(config) else None
    except UserError:  # the model may train all the same
        return None
