"""Load the trained model for export: merge adapters into the base model, or load a fully fine-tuned model.

Merging works layer by layer, so that memory holds about one copy of the model. A 4-bit base model is dequantized first,
because the adapters were trained on the 4-bit values: peft's merge would round the sum to 4 bits again, and the
original weights differ from the ones in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from orpo_ray.config.schema import ModelConfig
from orpo_ray.errors import UserError
from orpo_ray.model.adapter_folder import with_adapter
from orpo_ray.model.loading import load_model

# Options of a model that is loaded without training it.
_WITHOUT_TRAINING: dict[str, Any] = {
    "lora": None,
    "freeze": [],
    "gradient_checkpointing": "none",
    "attention": "concatenated",
}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def load_merged_model(model_config: ModelConfig, folder: Path, seed: int) -> Any:
    """Load the base model and merge adapters into its weights.

    Args:
        model_config: `model` section of the run's recipe.
        folder: the adapter folder.
        seed: seed of modules without pretrained weights.

    Returns:
        The merged model on the CPU, in the dtype of the training.

    Raises:
        UserError: base model or adapters cannot be loaded.
    """
    plain = model_config.model_copy(update=_WITHOUT_TRAINING | {"dtype": trained_dtype(model_config, folder)})
    # Quantize on a GPU if possible, as in training: CPU and GPU kernels can round ties differently.
    on_gpu = model_config.quantization is not None and torch.cuda.is_available()
    base: Any = load_model(plain, torch.device("cuda" if on_gpu else "cpu"), seed)
    if model_config.quantization is not None:
        dequantize(base)
        base.to("cpu")
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    # Adapters in float32, so that the sum is rounded only once, to the dtype of the base weights.
    adapted = with_adapter(base, folder, autocast=True)
    model = adapted.merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
        parameter.requires_grad_(False)
    model.config.use_cache = True  # disabled only for training
    return model.eval()


def load_full_model(model_config: ModelConfig, folder: Path, seed: int) -> Any:
    """Load a fully fine-tuned model from a folder, on the CPU. Raises UserError."""
    source = {"id": str(folder), "revision": None, "quantization": None, "dtype": trained_dtype(model_config, folder)}
    model: Any = load_model(model_config.model_copy(update=_WITHOUT_TRAINING | source), torch.device("cpu"), seed)
    model.config.use_cache = True
    return model.eval()


def trained_dtype(model_config: ModelConfig, folder: Path) -> str:
    """Return the dtype of the weights in a folder. `model.dtype: auto` can resolve to another one on this machine."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(min(folder.glob("*.safetensors")), framework="pt") as file:
            first = file.get_tensor(next(iter(file.keys())))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"cannot read the weights: {error}", field=str(folder), fix="the files are damaged; train the run again"
        ) from None
    return _DTYPES.get(first.dtype, model_config.dtype)


def dequantize(model: Any) -> None:
    """Replace each 4-bit layer by a plain linear layer on the CPU with the dequantized weights."""
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
    # Otherwise transformers still treats the model as quantized, and refuses to move it.
    model.hf_quantizer.remove_quantization_config(model)
