"""Divide 4-bit weights among the workers of ZeRO-3 while a model is loaded, each as soon as it is quantized.

transformers divides no weights of a quantized model: every worker would hold all of it until the engine divides it. But
it quantizes one weight after another, in an operation that its quantizer returns. Here, that operation also divides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def dividing_4bit(config: dict[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """Let models that are loaded in this context in 4 bits be divided. A collective.

    Weights that are not quantized are divided too: those that are loaded before a quantized one with the next of these,
    the others at the end. A model that is stored in 4 bits is read whole, and divided at the end.

    Args:
        config: DeepSpeed's.
        dtype: of the weights that are not quantized.
    """
    from transformers import modeling_utils
    from transformers.quantizers import auto

    name = "bitsandbytes_4bit"
    original, reserve = auto.AUTO_QUANTIZER_MAPPING[name], modeling_utils.caching_allocator_warmup
    auto.AUTO_QUANTIZER_MAPPING[name] = _quantizer(original, _Divider(config, dtype))
    # It would reserve the memory of the whole model on each GPU.
    modeling_utils.caching_allocator_warmup = lambda *_: None
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING[name] = original
        modeling_utils.caching_allocator_warmup = reserve


class _Divider:
    """Keeps this worker's part of a parameter, as DeepSpeed does when it makes a module."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        import deepspeed

        self._init: Any = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype)

    def divide(self, parameter: nn.Parameter) -> None:
        """Send rank 0's values to all workers, and keep a part of them. A collective."""
        if not hasattr(parameter, "ds_id") and parameter.device.type != "meta":
            self._init._zero_init_param(parameter)

    def divide_all(self, model: nn.Module) -> None:
        """Divide what is loaded of a model."""
        for parameter in model.parameters():
            self.divide(parameter)


def _quantizer(original: Any, divider: _Divider) -> Any:
    """Return transformers' class of 4-bit quantizers, whose weights are divided."""
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    class Dividing(Bnb4bitQuantize):
        def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
            divider.divide_all(kwargs["model"])
            result = super().convert(input_dict, *args, **kwargs)
            for parameter in result.values():
                divider.divide(parameter)
            return result

    class DividingQuantizer(original):
        def get_quantize_ops(self) -> Any:
            return Dividing(self)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            divider.divide_all(model)
            return super()._process_model_after_weight_loading(model, **kwargs)

    return DividingQuantizer
