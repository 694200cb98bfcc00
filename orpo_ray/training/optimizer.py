"""AdamW and the learning-rate schedule of a recipe, which all engines share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR

from orpo_ray.config.schema import OptimConfig
from orpo_ray.model.whole_shape import whole_shape


def adamw(trained: Sequence[torch.Tensor], optim: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters, with moments in 32 or 8 bits. Biases and norms do not decay."""
    groups = [
        {"params": [p for p in trained if len(whole_shape(p)) >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if len(whole_shape(p)) < 2], "weight_decay": 0.0},
    ]
    present = [group for group in groups if group["params"]]
    options: dict[str, Any] = {
        "lr": optim.learning_rate,
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "eps": optim.adam_epsilon,
    }
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(present, fused=True, **options)
    from orpo_ray.training.eight_bit_adamw import AdamW8bit, PagedAdamW8bit  # imports bitsandbytes

    kind: Any = AdamW8bit if optim.optimizer == "adamw_8bit" else PagedAdamW8bit
    return cast(torch.optim.Optimizer, kind(present, **options))


def state_bytes(elements: int, optim: OptimConfig) -> int:
    """About how many bytes the float32 copies of trained weights and both moments take."""
    return elements * (4 + 2 * 4 if optim.optimizer == "adamw" else 4 + 2 * 1)


def schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig, num_steps: int) -> LambdaLR:
    """Return transformers' linear, cosine or constant schedule, after a linear warm-up.

    The formulas are written here because importing transformers' own also imports peft and bitsandbytes, which takes
    seconds of every start.
    """
    warmup = math.ceil(optim.warmup * num_steps) if optim.warmup < 1 else round(optim.warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        if optim.schedule == "constant":
            return 1.0
        if optim.schedule == "linear":
            return max(0.0, (num_steps - step) / max(1, num_steps - warmup))
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, num_steps - warmup)))))

    return LambdaLR(optimizer, factor)


def follow_recipe(optimizer: torch.optim.Optimizer, rates: LambdaLR, optim: OptimConfig) -> None:
    """Set an optimizer whose state was loaded to the recipe's settings.

    The state has others only where a run begins with a checkpoint of another run.

    Args:
        optimizer: from `adamw`.
        rates: its schedule.
        optim: the recipe's section.
    """
    rates.base_lrs = [optim.learning_rate] * len(rates.base_lrs)
    for group, factor in zip(optimizer.param_groups, rates.lr_lambdas, strict=True):
        group["initial_lr"] = optim.learning_rate
        group["lr"] = optim.learning_rate * factor(rates.last_epoch)
        group["betas"], group["eps"] = (optim.adam_beta1, optim.adam_beta2), optim.adam_epsilon
        decays = any(len(whole_shape(weight)) >= 2 for weight in group["params"])
        group["weight_decay"] = optim.weight_decay if decays else 0.0
