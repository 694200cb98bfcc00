"""Folders of adapters in peft's layout: write one from a trained model's state, put one on a base model again.

Plain transformers must be able to load the folder. A `config.json` beside the adapters would make it look for the whole
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
from orpo_ray.model.families.registry import family_of
from orpo_ray.model.loading import load_model
from orpo_ray.model.lora import FIRST_ADAPTER
from orpo_ray.model.quantization import quantization_config
from orpo_ray.tiny_models.build import resolve

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters rather than a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`: the base model and its revision, the rank, what is adapted.

    Raises:
        UserError: the file cannot be read, or does not name a base model.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the adapter config: {error}", field=str(path), fix="give the folder of peft adapters"
        ) from None
    if not isinstance(config, dict) or not config.get("base_model_name_or_path"):
        raise UserError(
            "the adapter config names no base model", field=str(path), fix="set base_model_name_or_path in it"
        )
    return config


def save_adapter(
    model: Any, state: Mapping[str, torch.Tensor], model_config: ModelConfig, folder: Path, adapter: str = FIRST_ADAPTER
) -> None:
    """Write the adapters of a peft model, and the modules that were trained in full.

    Args:
        model: the peft model.
        state: gathered tensors by the names of a model whose only adapter this is; weights of the base model may be
            missing.
        model_config: the recipe's, which names the base model.
        folder: made if it does not exist.
        adapter: which of the model's adapters.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    found = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors refuses tensors that share memory.
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = resolve(model_config.id), model_config.revision
    config.save_pretrained(folder)


def with_adapter(model: torch.nn.Module, folder: Path, autocast: bool = False) -> Any:
    """Put adapters on their base model, in place.

    Args:
        model: the base model.
        folder: the adapters.
        autocast: keep the adapters in float32, whatever the base model's dtype is.

    Returns:
        peft's wrapper around the model.

    Raises:
        UserError: the adapters do not fit the model.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(folder))
        state = load_file(folder / ADAPTER_WEIGHTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers deprecates
            adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=autocast)
        result = set_peft_model_state_dict(adapted, state)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise _does_not_fit(folder, " ".join(str(error).split())[:300]) from None
    own = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    if own or result.unexpected_keys:
        raise _does_not_fit(folder, f"missing {own[:3]}, unexpected {list(result.unexpected_keys)[:3]}")
    if not autocast:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:  # peft makes those beside 4-bit weights in float32
                parameter.data = parameter.data.to(adapted.get_base_model().dtype)
    return adapted


def load_adapted(model_config: ModelConfig, folder: Path, device: torch.device, seed: int) -> torch.nn.Module:
    """Load the base model that a recipe names, quantized if the recipe says so, and put a folder's adapters on it.

    Raises:
        UserError: the model cannot be loaded, or the adapters do not fit.
    """
    plain = model_config.model_copy(update={"lora": None, "freeze": [], "gradient_checkpointing": "none"})
    adapted: torch.nn.Module = with_adapter(load_model(plain, device, seed), folder)
    return adapted


def quantized_base(model_config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The options of transformers' BitsAndBytesConfig that load a recipe's base model as it was in training.

    Args:
        model_config: the recipe's, with quantization.
        dtype: the model's, as torch names it.

    Raises:
        UserError: the base model cannot be found.
    """
    from transformers import AutoConfig

    assert model_config.quantization is not None
    try:
        config = AutoConfig.from_pretrained(
            resolve(model_config.id), revision=model_config.revision, trust_remote_code=model_config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the base model's config: {error}",
            field="model.id",
            value=model_config.id,
            fix="give a folder, or a name on the hub (with network access)",
        ) from None
    options = quantization_config(model_config.quantization, family_of(config), getattr(torch, dtype)).to_dict()
    kept = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
    return {name: options[name] for name in (*kept, "llm_int8_skip_modules")}


def _does_not_fit(folder: Path, why: str) -> UserError:
    return UserError(
        f"these adapters cannot be put on the base model: {why}",
        field=str(folder),
        fix="set model.id to the model that they were trained on",
    )
