"""What `model.gradient_checkpointing: auto` means for a run, by the memory of its devices."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.errors import UserError
from orpo_ray.objective.collectives import gather_rows
from orpo_ray.planning.gpus import GIB

_LOG = logging.getLogger(__name__)


def with_checkpointing(recipe: Recipe, device: torch.device) -> ModelConfig:
    """Return the recipe's model section with `auto` decided. A collective: all workers take the same."""
    if recipe.model.gradient_checkpointing != "auto":
        return recipe.model
    mode = "full"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / GIB * share_of_gpu(recipe)
        mode = decide(recipe, float(gather_rows([memory], device).min()))
    return recipe.model.model_copy(update={"gradient_checkpointing": mode})


def share_of_gpu(recipe: Recipe) -> float:
    """Return how much of a GPU each worker has, at most 1. Trials that share a GPU share its memory."""
    share = recipe.scaling.gpus_per_worker
    return share if share != "auto" and share > 0 else 1.0


def decide(recipe: Recipe, gib: float) -> str:
    """Choose on rank 0, whose choice all workers take: a dry run is seconds of work for a core.

    Args:
        recipe: the recipe.
        gib: memory that the worker with the least may use.
    """
    # Imported here because it imports torch's tracing, which takes time that other runs need not spend.
    from orpo_ray.planning.inputs import choose_checkpointing
    from orpo_ray.planning.plan import load_config

    chosen: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            chosen = [choose_checkpointing(recipe, load_config(recipe.model)[0], gib)]
        except UserError:  # plans do not support the model, which may train all the same
            chosen = ["full"]
        except Exception as error:  # noqa: BLE001 - a run does not end because of an estimate; other workers wait for it
            _LOG.warning("model.gradient_checkpointing is full, because the memory could not be estimated: %s", error)
            chosen = ["full"]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(chosen, src=0)
    return str(chosen[0])
