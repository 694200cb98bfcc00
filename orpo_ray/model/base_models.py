"""Keep the base model of a run with adapters for the next run of the process: loading can take minutes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from orpo_ray.config.schema import ModelConfig


class BaseModels:
    """Loads base models, and keeps the latest one if adapters are trained on it: its weights stay as they are then."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._kept: torch.nn.Module | None = None

    def get(
        self,
        model_config: ModelConfig,
        device: torch.device,
        load: Callable[[ModelConfig, torch.device], torch.nn.Module],
    ) -> torch.nn.Module:
        """Return a base model. The caller may change its modules, but not the values of frozen weights.

        The kept model and those that are returned have the same `Parameter` objects, so moving one moves all.

        Args:
            model_config: the recipe's.
            device: where the caller will put the model.
            load: makes the model as transformers does.

        Raises:
            UserError: the model cannot be loaded.
        """
        plain = model_config.model_copy(update={"lora": None, "gradient_checkpointing": "none"})
        key = (plain.model_dump_json(), str(device))
        if key != self._key or model_config.lora is None:
            self._key = self._kept = None  # before another model is loaded
            model = load(model_config, device)
            if model_config.lora is None:
                return model
            self._key, self._kept = key, model
        assert self._kept is not None
        return copy_of_modules(self._kept)


def copy_of_modules(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model whose parameters are those of the model itself. Buffers, which are small, are copied."""
    shared: list[Any] = list(model.parameters())
    # The scales of 4-bit weights, which bitsandbytes keeps outside of parameters.
    shared += [state for module in model.modules() if (state := getattr(module, "quant_state", None)) is not None]
    return copy.deepcopy(model, {id(each): each for each in shared})
