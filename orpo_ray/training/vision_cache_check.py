"""A warning at the start of a new run where `model.vision_cache` makes it slower."""

from __future__ import annotations

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.planning.gpus import gpu_named
from orpo_ray.training.worker_context import WorkerContext


def slow_cache(recipe: Recipe, context: WorkerContext) -> str | None:
    """Return a warning if this worker's GPU computes image features faster than a usual disk reads them."""
    if recipe.model.vision_cache is None or context.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(context.device)
    return slow_cache_on(recipe, name, context.num_workers, context.workers_of_node)


def slow_cache_on(recipe: Recipe, name: str, workers: int, workers_of_node: int) -> str | None:
    """The same for a GPU of this name; None for a GPU type or a model that plans do not know.

    Args:
        recipe: the recipe.
        name: the device's name.
        workers: of the run.
        workers_of_node: those that share a disk.
    """
    gpu = gpu_named(name)
    if gpu is None:
        return None
    # Imported here because it imports torch's tracing, which takes time that other runs need not spend.
    from orpo_ray.planning.cached_features import cached_features_of_run, warning_of_run
    from orpo_ray.planning.inputs import can_plan
    from orpo_ray.planning.plan import load_config, silent_libraries

    try:
        with silent_libraries():
            config, _ = load_config(recipe.model)
            if not can_plan(config):
                return None
            found = cached_features_of_run(recipe, config, gpu, workers, workers_of_node)
    except Exception:  # noqa: BLE001 - a run does not end because of an estimate
        return None
    return warning_of_run(found, workers_of_node)
