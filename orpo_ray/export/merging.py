"""Base model + adapters -> one plain model, layer by layer, so that memory holds about one copy of it.

A base in 4 bits is dequantised first, since its 4-bit values are what the adapters were trained on. peft's own merge
into 4 bits would round the sum to 4 bits again, and the original weights are not those that the adapters have seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from orpo_ray.config.schema import ModelConfig
from orpo_ray.errors import UserError
from orpo_ray.model.adapters import with_adapter
from orpo_ray.model.loading import load_model

# Nothing is trained, and any model can do it.
_AS_IT_IS: dict[str, Any] = {"lora": None, "freeze": [], "gradient_checkpointing": False, "attention": "concatenated"}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def merged_model(section: ModelConfig, folder: Path, seed: int) -> Any:
    """The model of a recipe's section with a folder's adapters in its weights, on the CPU. Raises UserError.

    The weights have the dtype that was trained in, not the one that this machine would train in.
    """
    plain = section.model_copy(update=_AS_IT_IS | {"dtype": trained_dtype(section, folder)})
    # Quantised where it was in training, as far as this machine can: kernels may round ties differently.
    on_gpu = section.quantization is not None and torch.cuda.is_available()
    base: Any = load_model(plain, torch.device("cuda" if on_gpu else "cpu"), seed)
    if section.quantization is not None:
        dequantize(base)
        base.to("cpu")
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    # In float32 the sum is rounded once, when it becomes a weight of the base's type.
    adapted = with_adapter(base, folder, autocast=True)
    model = adapted.merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
        parameter.requires_grad_(False)
    model.config.use_cache = True  # off for training only
    return model.eval()


def whole_model(section: ModelConfig, folder: Path, seed: int) -> Any:
    """The model that a full fine-tuning left in a folder, on the CPU. Raises UserError."""
    own = {"id": str(folder), "revision": None, "quantization": None, "dtype": trained_dtype(section, folder)}
    model: Any = load_model(section.model_copy(update=_AS_IT_IS | own), torch.device("cpu"), seed)
    model.config.use_cache = True
    return model.eval()


def trained_dtype(section: ModelConfig, folder: Path) -> str:
    """The dtype of what training wrote, adapters or a whole model; `model.dtype: auto` may mean another one here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(min(folder.glob("*.safetensors")), framework="pt") as file:
            first = file.get_tensor(next(iter(file.keys())))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"its weights cannot be read: {error}", field=str(folder)) from None
    return _DTYPES.get(first.dtype, section.dtype)


def dequantize(model: Any) -> None:
    """Make every 4-bit layer a plain one, on the CPU, with the weights that it multiplied by."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    for name in [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]:
        layer = model.get_submodule(name)
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to("cpu", model.config.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.data.to("cpu"), requires_grad=False)
        model.set_submodule(name, plain)
    # Else transformers goes on taking it for a quantised one, and refuses to move it.
    model.hf_quantizer.remove_quantization_config(model)
