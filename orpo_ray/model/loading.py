"""Load the model of a recipe's model section: dtype, attention, frozen parts, LoRA, gradient checkpointing."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.balance import Layout
from orpo_ray.errors import UserError
from orpo_ray.model.base_models import BaseModels
from orpo_ray.model.families.base import Family
from orpo_ray.model.families.registry import family_of
from orpo_ray.model.fused_layers import fuse_adapters, fuse_layers
from orpo_ray.model.fused_ops import has_kernels
from orpo_ray.model.gradient_checkpointing import enable_checkpointing
from orpo_ray.model.lora import add_adapters
from orpo_ray.model.quantization import check_quantized, check_saved_quantization, quantization_config
from orpo_ray.model.sequence_group import FIELD, check_heads
from orpo_ray.model.shared_prefix import NAME as SHARED_PREFIX
from orpo_ray.model.shared_prefix import register
from orpo_ray.model.vision_attention import use_in as use_vision_attention
from orpo_ray.processing.processor import cannot_load
from orpo_ray.tiny_models.build import resolve

if not torch.cuda.is_available():
    # Otherwise transformers looks for DeepSpeed, which warns in every process that it has to guess this.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def layout_of(model: torch.nn.Module) -> Layout:
    """The layout of the batches that this model's attention takes."""
    text = without_adapters(model).config.get_text_config()
    return "shared_prefix" if text._attn_implementation == SHARED_PREFIX else "concatenated"


def vocabulary_size(model: torch.nn.Module) -> int:
    """Rows of the output head."""
    return int(without_adapters(model).config.get_text_config().vocab_size)


@dataclass(frozen=True)
class Attention:
    """The layout that a model runs in."""

    layout: Layout
    why: str | None = None
    """Why the recipe's `auto` did not choose the shared prefix, if so."""


def pick_attention(model_config: ModelConfig, config: Any = None) -> Attention:
    """Choose what `model.attention` means for a model.

    Args:
        model_config: the recipe's.
        config: the model's transformers config; read if not given.

    Raises:
        UserError: the model cannot run as the recipe asks, or its family is unknown.
    """
    config = config or load_config(model_config)
    why = family_of(config).why_not_shared_prefix(config)
    if model_config.attention == "concatenated":
        return Attention("concatenated")
    if model_config.attention == "shared_prefix" and why:
        fix = "set it to auto or concatenated"
        raise UserError(
            f"this model cannot share a prefix: {why}", field="model.attention", value="shared_prefix", fix=fix
        )
    return Attention("concatenated", why) if why else Attention("shared_prefix")


def check_divisible(model_config: ModelConfig, size: int, config: Any = None) -> None:
    """Check that workers can compute a row of this model together.

    Args:
        model_config: the recipe's.
        size: how many (`scaling.sequence_parallel`), at least 2.
        config: the model's transformers config; read if not given.

    Raises:
        UserError: they cannot, or the model is not found.
    """
    config = config or load_config(model_config)
    if why := family_of(config).why_not_divided(config):
        raise UserError(f"workers cannot compute pairs of this model together: {why}", field=FIELD, value=size,
                        fix="set it to 1")  # fmt: skip
    check_heads(config.get_text_config(), size)


def concatenated_because(why: str) -> str:
    """One line that says why a run does not share prefixes."""
    return f"attention is concatenated, about twice the work of a shared prefix: {why}"


def load_model(
    model_config: ModelConfig, device: torch.device, seed: int, bases: BaseModels | None = None
) -> torch.nn.Module:
    """Load a model, ready to train.

    Args:
        model_config: the recipe's.
        device: where to put the model.
        seed: of the adapters' first weights.
        bases: keeps base models between runs.

    Raises:
        UserError: the model cannot be loaded, or the recipe does not fit it.
    """
    model = load_base(model_config, device) if bases is None else bases.get(model_config, device, load_base)
    wanted = model_config.fused_layers
    model = ready_to_train(model, model_config, seed, has_kernels(device.type) if wanted == "auto" else wanted)
    if model_config.quantization is None:
        model.to(device)  # also the adapters; a quantized model is already there
    return model


def load_base(model_config: ModelConfig, device: torch.device) -> torch.nn.Module:
    """Load a model as transformers makes it, with the attention of the recipe.

    Args:
        model_config: the recipe's.
        device: where to put the weights, except under ZeRO-3, which divides them in main memory first.

    Raises:
        UserError: the model cannot be loaded, or the recipe does not fit it.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    attention = pick_attention(model_config)
    config = load_config(model_config)
    family = family_of(config)
    language = own_attention(config)
    dtype = pick_dtype(model_config.dtype, device)
    options: dict[str, Any] = {}
    if model_config.quantization is not None or hasattr(config, "quantization_config"):
        options = _quantized(model_config, config, family, dtype, device)
    elif device.type == "cuda" and not is_deepspeed_zero3_enabled():
        options = {"device_map": {"": device}}  # otherwise each worker of a node has the model in main memory first
    if attention.layout == "shared_prefix":
        register()
        language = SHARED_PREFIX
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            resolve(model_config.id),
            revision=model_config.revision,
            trust_remote_code=model_config.trust_remote_code,
            use_safetensors=None if model_config.allow_pickle else True,
            weights_only=True,
            dtype=dtype,
            attn_implementation={"text_config": language, "vision_config": "sdpa"},
            **options,
        )
    except (OSError, ValueError, ImportError, pickle.UnpicklingError) as error:
        raise cannot_load("model", model_config.id, error) from None
    use_vision_attention(model)
    if model_config.quantization is not None:
        check_quantized(model, model_config.quantization)
    return model


def ready_to_train(model: Any, model_config: ModelConfig, seed: int, fused: bool) -> torch.nn.Module:
    """Prepare a model as transformers made it: freeze parts, add adapters, turn on gradient checkpointing.

    Args:
        model: the transformers model.
        model_config: the recipe's.
        seed: of the adapters' first weights.
        fused: whether layers run in fewer passes over memory (`model.fused_layers`).

    Raises:
        UserError: the recipe does not fit the model.
    """
    family = family_of(model.config)
    model.config.use_cache = False
    if model_config.quantization is None:
        model.requires_grad_(True)  # Idefics freezes most of itself
    _freeze(model, model_config, family)
    if fused:
        fuse_layers(model)
    if model_config.lora is not None:
        model = add_adapters(model, model_config, family, seed)
        if fused and model_config.gradient_checkpointing != "selective":  # it keeps what would be written to in place
            fuse_adapters(model)
    enable_checkpointing(model, model_config.gradient_checkpointing)
    model.train()
    return model


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Translate `auto | float32 | bfloat16` to torch's dtype on this device."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def without_adapters(model: torch.nn.Module) -> Any:
    """The transformers model itself, whether or not peft is wrapped around it (adapted layers stay adapted)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether peft is wrapped around the model."""
    return hasattr(model, "peft_config")


def commit_of(model_config: ModelConfig) -> str | None:
    """The hub commit that a model is loaded from, by the path of its cached config; None for a folder.

    Raises:
        UserError: the model cannot be found.
    """
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    load_config(model_config)
    path = resolve(model_config.id)
    if Path(path).is_dir():
        return None
    commit: str | None = extract_commit_hash(cached_file(path, "config.json", revision=model_config.revision), None)
    return commit


def load_config(model_config: ModelConfig) -> Any:
    """The model's transformers config alone."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            resolve(model_config.id), revision=model_config.revision, trust_remote_code=model_config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise cannot_load("model", model_config.id, error) from None


def _quantized(
    model_config: ModelConfig, config: Any, family: Family, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The arguments of from_pretrained that load a model in 4 bits, or a model that was saved in 4 bits."""
    saved = check_saved_quantization(config, model_config)
    assert model_config.quantization is not None
    wanted = quantization_config(model_config.quantization, family, dtype)
    if not saved:
        return {"quantization_config": wanted, "device_map": {"": device}}
    # transformers follows what was saved, but the dtype to compute in is the recipe's to choose.
    on_disk = config.quantization_config
    on_disk["bnb_4bit_compute_dtype"] = str(wanted.bnb_4bit_compute_dtype).removeprefix("torch.")
    return {"config": config, "device_map": {"": device}}


def own_attention(config: Any) -> str:
    """The attention of the language model on the concatenated path: `eager` where scores are capped, else `sdpa`."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"


def _freeze(model: torch.nn.Module, model_config: ModelConfig, family: Family) -> None:
    for component in model_config.freeze:
        prefixes = family.prefixes(component)
        # Qwen2.5-VL's connector lies inside its vision encoder.
        inner = family.connector if component == "vision" else None
        found = [
            parameter
            for name, parameter in model.named_parameters()
            if name.startswith(prefixes) and not (inner and name.startswith(inner))
        ]
        if not found:
            raise UserError(
                f"no parameter's name starts with {' or '.join(prefixes)}",
                field="model.freeze",
                value=component,
                fix="remove it from model.freeze",
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if "language" in model_config.freeze:
        model.get_output_embeddings().requires_grad_(False)  # type: ignore[operator]
