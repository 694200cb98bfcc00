"""DeepSpeed's config of a recipe."""

from __future__ import annotations

import copy
from typing import Any

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.planning.states import reduce_bucket
from orpo_ray.storage.files import one_line


def deepspeed_config(recipe: Recipe, dtype: torch.dtype, hidden_size: int, num_trained: int) -> dict[str, Any]:
    """Return the DeepSpeed config of a recipe.

    Args:
        recipe: the resolved recipe.
        dtype: the type of the trained weights.
        hidden_size: of the language model; decides which weights ZeRO-3 leaves whole.
        num_trained: elements of all trained weights.
    """
    stage = recipe.deepspeed.zero_stage
    config = loading_config(recipe, dtype) | {
        # The training loop builds steps from micro-batches itself.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step has as many micro-batches as its pairs need
        "gradient_clipping": recipe.optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        # Offloaded states are updated by torch's fused AdamW, which runs on CPUs as well. DeepSpeed's own would have to
        # be compiled on each node first.
        "zero_force_ds_cpu_optimizer": False,
        # Gradients are added up in float32, over micro-batches and over workers. By default, they are added in the
        # type of the weights: in bfloat16, a gradient below 1/256 of the sum so far is lost. Without immediate updates,
        # stage 1 would keep bfloat16 gradients of all weights besides.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    config["bf16"] |= {"immediate_grad_update": True}
    config["zero_optimization"] |= {
        # Stage 1 reduces once a step, after the last backward. DeepSpeed refuses overlap there.
        "overlap_comm": stage >= 2,
        "reduce_bucket_size": reduce_bucket(hidden_size, num_trained),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    return _merged(config, recipe.deepspeed.config)


def loading_config(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """Return the part of the config that says how ZeRO-3 divides weights, which is known before the model is."""
    own = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": recipe.deepspeed.zero_stage, **_offload(recipe)},
    }
    more = recipe.deepspeed.config
    return _merged(own, {"zero_optimization": more["zero_optimization"]} if "zero_optimization" in more else {})


def check_config(config: dict[str, Any], recipe: Recipe) -> None:
    """Check DeepSpeed's config where the recipe adds to it.

    Raises:
        UserError: DeepSpeed refuses it.
    """
    if not recipe.deepspeed.config:
        return
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        raise UserError(
            f"DeepSpeed refuses these settings: {one_line(error)}",
            field="deepspeed.config",
            value=recipe.deepspeed.config,
            fix="correct or remove the setting; deepspeed.ai/docs/config-json lists all",
        ) from None


def _merged(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Add settings to a config; mappings are merged, other values replaced."""
    merged = dict(config)
    for name, value in more.items():
        own = merged.get(name)
        merged[name] = _merged(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return merged


def without_effect(recipe: Recipe, device: torch.device) -> str | None:
    """Return a line about offloading that does nothing on this device; None if there is none."""
    if device.type != "cpu" or not (offloaded := sorted(_offload(recipe))):
        return None
    names = " and ".join(f"deepspeed.{name}" for name in offloaded)
    return f"{names}: no effect in a run without GPUs, where everything is in main memory already"


def _offload(recipe: Recipe) -> dict[str, Any]:
    wanted = {
        "offload_optimizer": recipe.deepspeed.offload_optimizer,
        "offload_param": recipe.deepspeed.offload_param,
    }
    # From pinned memory, copies run beside the computation. A CPU run has none.
    pinned = torch.cuda.is_available()
    return {name: {"device": device, "pin_memory": pinned} for name, device in wanted.items() if device != "none"}
