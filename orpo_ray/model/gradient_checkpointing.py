"""Gradient checkpointing: which activations of a layer are kept for the backward pass, and which are recomputed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from orpo_ray.config.field_types import Checkpointing

# Operations whose results `selective` keeps: matrix products and attention, which are nearly all of a layer's FLOPs. By
# name, since the operation of variable-length attention exists only once its module is imported.
_KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
}


def enable_checkpointing(model: Any, mode: Checkpointing) -> None:
    """Recompute what `mode` does not keep, in every layer of the language model and the vision encoder.

    Args:
        model: transformers' model, or peft's wrapper around one.
        mode: `auto` means `full` here; whoever knows the memory of the device decides before.
    """
    if mode == "none":
        return
    # Non-reentrant: reentrant checkpointing drops gradients if no input of a layer requires one, as with frozen
    # embeddings.
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    with deprecated_names_allowed():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # transformers lets the outputs of all embeddings require gradients, as reentrant checkpointing needs. With LoRA,
    # the backward pass would then go through the whole frozen vision encoder.
    model.disable_input_require_grads()


@contextmanager
def deprecated_names_allowed() -> Iterator[None]:
    """Hide transformers' warnings about the old names of checkpointing.

    The new names are missing from some supported versions, and peft asks for the old ones.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
        yield


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = operation.name().split(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
