"""A folder of adapters in peft's layout: written from a trained model's state, put on a base model again.

What plain transformers needs decides the layout: a `config.json` beside the adapters would make it look for the whole
model's weights there, so there is none, and `adapter_config.json` names the base model.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.errors import UserError
from orpo_ray.model.derived_family import family_of
from orpo_ray.model.loading import load_model
from orpo_ray.model.quantization import quantization_config
from orpo_ray.tiny_models.build import resolve

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters rather than a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_config(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says: the base model and its revision, rank, what is adapted. Raises UserError."""
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", field=str(path)) from None
    if not isinstance(config, dict) or not config.get("base_model_name_or_path"):
        raise UserError("names no base model", field=str(path), fix="set base_model_name_or_path in it")
    return config


def save_adapter(model: Any, state: Mapping[str, torch.Tensor], section: ModelConfig, folder: Path) -> None:
    """Write the adapters of a peft model, and the modules that were trained in full beside them.

    state: the model's own names -> tensors, gathered; weights of the base may be missing from it.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    found = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, since safetensors takes no tensors that share memory.
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = resolve(section.id), section.revision
    config.save_pretrained(folder)


def with_adapter(model: torch.nn.Module, folder: Path, autocast: bool = False) -> Any:
    """Put adapters on their base model, in place; returns peft's wrapper around it. Raises UserError if they don't fit.

    autocast: hold them in float32, whatever the base is.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(folder))
        state = load_file(folder / ADAPTER_WEIGHTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is going
            adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=autocast)
        result = set_peft_model_state_dict(adapted, state)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise _does_not_fit(folder, " ".join(str(error).split())[:300]) from None
    own = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    if own or result.unexpected_keys:
        raise _does_not_fit(folder, f"missing {own[:3]}, unexpected {list(result.unexpected_keys)[:3]}")
    if not autocast:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:  # those beside 4-bit weights were made in float32
                parameter.data = parameter.data.to(adapted.get_base_model().dtype)
    return adapted


def load_adapted(section: ModelConfig, folder: Path, device: torch.device, seed: int) -> torch.nn.Module:
    """The base model that a recipe names, quantised if it says so, with a folder's adapters. Raises UserError."""
    plain = section.model_copy(update={"lora": None, "freeze": [], "gradient_checkpointing": False})
    adapted: torch.nn.Module = with_adapter(load_model(plain, device, seed), folder)
    return adapted


def quantized_base(section: ModelConfig, dtype: str) -> dict[str, Any]:
    """The options of transformers' BitsAndBytesConfig that load a recipe's base model as it was in training.

    Raises UserError where the base model cannot be found.
    """
    from transformers import AutoConfig

    assert section.quantization is not None
    try:
        config = AutoConfig.from_pretrained(
            resolve(section.id), revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be loaded: {error}", field="model.id", value=section.id) from None
    options = quantization_config(section.quantization, family_of(config), getattr(torch, dtype)).to_dict()
    kept = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
    return {name: options[name] for name in (*kept, "llm_int8_skip_modules")}


def _does_not_fit(folder: Path, why: str) -> UserError:
    return UserError(f"these adapters cannot be put on the base model: {why}", field=str(folder))
