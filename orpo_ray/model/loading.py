"""A recipe's model section -> processor and model: dtype, frozen parts, LoRA, gradient checkpointing."""

from __future__ import annotations

import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.packing import Layout
from orpo_ray.errors import UserError
from orpo_ray.model.derived_family import family_of
from orpo_ray.model.families import Family, why_not_shared_prefix
from orpo_ray.model.lora import add_adapters
from orpo_ray.model.quantization import check_quantized, check_saved_quantization, quantization_config
from orpo_ray.model.shared_prefix import NAME as SHARED_PREFIX
from orpo_ray.model.shared_prefix import register
from orpo_ray.processing.processor import cannot_load
from orpo_ray.tiny_models.build import resolve

if not torch.cuda.is_available():
    # transformers looks for DeepSpeed, which warns in every process that it has to guess this.
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
    """How a model runs a pair, and why, where the recipe's `auto` could not take the shared-prefix path."""

    layout: Layout
    why: str | None = None


def pick_attention(section: ModelConfig, config: Any = None) -> Attention:
    """What `model.attention` means for this model. Raises UserError if it cannot be had, or the model can't.

    config: the model's, where it is at hand.
    """
    config = config or _config(section)
    why = why_not_shared_prefix(config, family_of(config))
    if section.attention == "concatenated":
        return Attention("concatenated")
    if section.attention == "shared_prefix" and why:
        fix = "set it to auto or concatenated"
        raise UserError(
            f"this model cannot share a prefix: {why}", field="model.attention", value="shared_prefix", fix=fix
        )
    return Attention("concatenated", why) if why else Attention("shared_prefix")


def concatenated_because(why: str) -> str:
    """The one line that says why a run does not share prefixes."""
    return f"attention is concatenated, about twice the work of a shared prefix: {why}"


def load_model(section: ModelConfig, device: torch.device, seed: int) -> torch.nn.Module:
    """The model on `device`, ready to train: parts frozen, adapters added. Raises UserError."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    attention = pick_attention(section)
    config = _config(section)
    family = family_of(config)
    language = own_attention(config)
    dtype = pick_dtype(section.dtype, device)
    quantized: dict[str, Any] = {}
    if section.quantization is not None or hasattr(config, "quantization_config"):
        quantized = _quantized(section, config, family, dtype, device)
    if attention.layout == "shared_prefix":
        register()
        language = SHARED_PREFIX
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            resolve(section.id),
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=None if section.allow_pickle else True,
            weights_only=True,
            dtype=dtype,
            attn_implementation={"text_config": language, "vision_config": "sdpa"},
            **quantized,
        )
    except (OSError, ValueError, ImportError, pickle.UnpicklingError) as error:
        raise cannot_load("model", section.id, error) from None
    if section.quantization is not None:
        check_quantized(model, section.quantization)
    model = ready_to_train(model, section, seed)
    if section.quantization is None:
        model.to(device)  # a quantised one was put there as it was quantised
    return model


def ready_to_train(model: Any, section: ModelConfig, seed: int) -> torch.nn.Module:
    """A model as transformers made it: parts frozen, adapters added, gradient checkpointing on. Raises UserError."""
    family = family_of(model.config)
    model.config.use_cache = False
    if section.quantization is None:
        model.requires_grad_(True)  # Idefics freezes most of itself
    _freeze(model, section, family)
    if section.lora is not None:
        model = add_adapters(model, section, family, seed)
    if section.gradient_checkpointing:
        # Non-reentrant: the reentrant one drops gradients when no input of a block requires one (frozen embeddings).
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in all versions that are supported
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto | float32 | bfloat16` -> torch's dtype for this device."""
    if name == "auto":
        good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if good else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def without_adapters(model: torch.nn.Module) -> Any:
    """The transformers model itself, whether or not peft is wrapped around it (adapted layers stay adapted)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether peft is wrapped around the model."""
    return hasattr(model, "peft_config")


def commit_of(section: ModelConfig) -> str | None:
    """The commit that a model of the hub is taken from, by where its config lies in the cache; None for a folder.

    Raises UserError.
    """
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    _config(section)
    path = resolve(section.id)
    if Path(path).is_dir():
        return None
    commit: str | None = extract_commit_hash(cached_file(path, "config.json", revision=section.revision), None)
    return commit


def _config(section: ModelConfig) -> Any:
    """The model's config alone."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            resolve(section.id), revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise cannot_load("model", section.id, error) from None


def _quantized(
    section: ModelConfig, config: Any, family: Family, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What from_pretrained is told to load the model in 4 bits, or one that is saved so."""
    saved = check_saved_quantization(config, section)
    assert section.quantization is not None
    wanted = quantization_config(section.quantization, family, dtype)
    if not saved:
        return {"quantization_config": wanted, "device_map": {"": device}}
    # transformers goes by what was saved; how it is multiplied is not the file's to say.
    on_disk = config.quantization_config
    on_disk["bnb_4bit_compute_dtype"] = str(wanted.bnb_4bit_compute_dtype).removeprefix("torch.")
    return {"config": config, "device_map": {"": device}}


def own_attention(config: Any) -> str:
    """What runs the language model's attention on the concatenated path: no fused kernel caps scores."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"


def _freeze(model: torch.nn.Module, section: ModelConfig, family: Family) -> None:
    for part in section.freeze:
        prefix = family.prefix(part)
        # Qwen2.5-VL's connector lies inside its vision part.
        inner = family.connector if part == "vision" else None
        found = [
            parameter
            for name, parameter in model.named_parameters()
            if name.startswith(prefix) and not (inner and name.startswith(inner))
        ]
        if not found:
            raise UserError(f"no parameter starts with {' or '.join(prefix)}", field="model.freeze", value=part)
        for parameter in found:
            parameter.requires_grad_(False)
    if "language" in section.freeze:
        model.get_output_embeddings().requires_grad_(False)  # type: ignore[operator]
