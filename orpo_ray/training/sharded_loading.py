"""Load the model of a run. Under ZeRO-3, each weight is divided among the workers as soon as it is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.model.base_models import BaseModels
from orpo_ray.model.loading import load_model, pick_dtype
from orpo_ray.objective.pair_model import PIXELS_AT_ONCE, PairModel
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.tiny_models.build import resolve
from orpo_ray.training.auto_gradient_checkpointing import with_checkpointing
from orpo_ray.training.quantized_loading import dividing_4bit


def load_for_training(recipe: Recipe, device: torch.device, bases: BaseModels | None = None) -> torch.nn.Module:
    """Load the model of a recipe as the engine of its ZeRO stage takes it. A collective.

    Under ZeRO-3, transformers makes one module after another, and DeepSpeed keeps this worker's part of its weights.
    Then rank 0 reads the files and sends each weight to the others. No worker ever holds more than its part of the
    model and one weight; rank 0 maps the files into memory in addition, and the system can drop what it has read.

    4-bit weights are divided as soon as each is quantized, on every worker (`quantized_loading.py`). Their scales, 1/64
    byte for each weight, stay whole on every worker. Other stages need whole weights on every worker.

    Args:
        recipe: the recipe.
        device: where to put the model.
        bases: keeps base models between runs.

    Raises:
        UserError: the model cannot be loaded, or the recipe does not fit it.
    """
    resolve(recipe.model.id)  # a tiny model is built whole, before its weights would be divided
    torch.manual_seed(0)  # of weights that the files lack: the same ones on all workers, and after a resume
    with _dividing(recipe, device):
        return load_model(recipe.model, device, recipe.optim.seed, bases)


def load_pair_model(recipe: Recipe, processor: Any, device: torch.device, bases: BaseModels | None = None) -> PairModel:
    """Load the model of a recipe, with checkpointing decided by the memory of the devices. A collective.

    Args:
        recipe: the recipe.
        processor: the model's.
        device: where to put the model.
        bases: keeps base models between runs.

    Raises:
        UserError: the model cannot be loaded, or the recipe does not fit it.
    """
    model_config = with_checkpointing(recipe, device)
    model = load_for_training(recipe.model_copy(update={"model": model_config}), device, bases)
    bounded = model_config.gradient_checkpointing != "none" and recipe.deepspeed.zero_stage < 3
    pixels_at_once = PIXELS_AT_ONCE.get(device.type) if bounded else None
    cache = recipe.model.vision_cache
    return PairModel(model, PixelNorm.of(processor), pixels_at_once, Path(cache) if cache is not None else None)


@contextmanager
def _dividing(recipe: Recipe, device: torch.device) -> Iterator[None]:
    if recipe.deepspeed.zero_stage < 3:
        yield
        return
    # Importing DeepSpeed takes seconds.
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    from orpo_ray.training.deepspeed_config import check_config, loading_config
    from orpo_ray.training.deepspeed_engine import prepare_deepspeed

    prepare_deepspeed(recipe.scaling.timeout_s)
    dtype = pick_dtype(recipe.model.dtype, device)
    config = loading_config(recipe, dtype)
    check_config(config, recipe)
    if recipe.model.quantization is not None:
        with dividing_4bit(config, dtype):
            yield
        return
    # transformers and peft divide and gather weights for as long as this object is alive.
    alive = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive
