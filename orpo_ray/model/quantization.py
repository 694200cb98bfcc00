"""Load the frozen language model in 4 bits (bitsandbytes) and everything else as it is, for QLoRA.

peft's `prepare_model_for_kbit_training` is not used, on purpose. It makes every unquantized weight float32, vision
encoder, embeddings and head included. That costs more memory than 4 bits save, and the weights then meet activations
of another dtype. Norms compute in float32 whatever they are stored in, adapters keep the model's dtype (ZeRO gathers
one dtype only), peft itself freezes the base model, and the recipe decides on gradient checkpointing (non-reentrant,
so the inputs need no gradient).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from orpo_ray.config.schema import ModelConfig, QuantizationConfig
from orpo_ray.errors import UserError
from orpo_ray.model.families.base import Family

_DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "bfloat16": torch.bfloat16}
_HEADS = ("lm_head",)


def quantization_config(quantization: QuantizationConfig, family: Family, dtype: torch.dtype) -> Any:
    """Make transformers' quantization config.

    Only linear layers of the language model are quantized. The output head is not: it is tied to the embeddings in many
    families, and an error in it is an error in every log-prob.

    Args:
        quantization: the recipe's.
        family: the model's.
        dtype: of the weights that are not quantized.

    Raises:
        UserError: the storage dtype does not fit the model's.
    """
    from transformers import BitsAndBytesConfig

    storage = _DTYPES[quantization.quant_storage]
    if storage not in (torch.uint8, dtype):
        # The engine casts floating-point weights to the model's dtype, which would destroy packed bits.
        raise UserError(
            f"packed weights cannot be stored in a floating-point dtype other than the model's {_name(dtype)}",
            field="model.quantization.quant_storage",
            value=quantization.quant_storage,
            fix=f"set it to uint8 or {_name(dtype)}",
        )
    # transformers matches each as a regular expression from the start of a name to the end of a path component.
    outside = rf"(?!{'|'.join(map(re.escape, family.language))}).*"
    modules = [re.escape(prefix.removesuffix(".")) for prefix in (*family.vision, *family.connector)]
    named = [rf"(?:.*\.)?{re.escape(name)}" for name in (*_HEADS, *quantization.skip_modules)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.use_double_quant,
        bnb_4bit_compute_dtype=dtype if quantization.compute_dtype == "auto" else _DTYPES[quantization.compute_dtype],
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=[outside, *modules, *named],
    )


def check_saved_quantization(config: Any, model_config: ModelConfig) -> bool:
    """Whether the model's weights are 4-bit on disk already.

    Args:
        config: the model's transformers config.
        model_config: the recipe's.

    Raises:
        UserError: the weights are quantized in another way than the recipe says.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return False
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    what = saved.get("quant_method") or "unknown"
    if not saved.get("load_in_4bit", saved.get("_load_in_4bit")):
        raise UserError(
            f"the model's weights are already quantized ({what}), but adapters can only be trained on 4-bit weights of "
            "bitsandbytes",
            field="model.id",
            value=model_config.id,
            fix="use the model that it was made from; add model.quantization: {} to quantize that",
        )
    if model_config.quantization is None:
        raise UserError(
            "the model's weights are already in 4 bits, but the recipe does not say so",
            field="model.quantization",
            fix="add model.quantization and model.lora, or use the model that it was made from",
        )
    wanted = {
        "quant_type": model_config.quantization.quant_type,
        "use_double_quant": model_config.quantization.use_double_quant,
        "quant_storage": model_config.quantization.quant_storage,
    }
    defaults = {"quant_type": "fp4", "use_double_quant": False, "quant_storage": "uint8"}
    found = {name: saved.get(f"bnb_4bit_{name}", default) for name, default in defaults.items()}
    if differing := [name for name in wanted if wanted[name] != found[name]]:
        raise UserError(
            f"the model's weights are already in 4 bits, with {', '.join(f'{n} {found[n]}' for n in differing)}",
            field=f"model.quantization.{differing[0]}",
            value=wanted[differing[0]],
            fix=f"set model.quantization.{differing[0]} to {found[differing[0]]}",
        )
    return True


def check_quantized(model: nn.Module, quantization: QuantizationConfig) -> None:
    """Check that quantization did what the recipe says, and prepare the quantized layers for training.

    Raises:
        UserError: no layer became 4-bit, or a module to skip does not exist.
    """
    from bitsandbytes.nn.modules import Linear4bit

    names = [name for name, _ in model.named_modules()]
    for skipped in quantization.skip_modules:
        if not any(name == skipped or name.endswith(f".{skipped}") for name in names):
            raise UserError(
                "no module has this name",
                field="model.quantization.skip_modules",
                value=skipped,
                fix="give the name of a module of the language model",
            )
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not quantized:
        raise UserError(
            "no linear layer is left to quantize",
            field="model.quantization.skip_modules",
            value=quantization.skip_modules,
            fix="remove some of the names",
        )
    for module in quantized:
        # On some CPUs evaluation would repack the weights into a layout that training cannot read.
        module.support_avx512bf16_for_cpu = False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
