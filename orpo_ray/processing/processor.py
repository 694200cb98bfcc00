"""Load a model's processor, and explain why a model or its processor cannot be loaded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from orpo_ray.errors import UserError
from orpo_ray.processing.chat_templates import give_template
from orpo_ray.tiny_models.build import resolve

SAFE_WEIGHTS = "model.safetensors"


def load_processor(model_id: str, revision: str | None, trust_remote_code: bool = False) -> Any:
    """Load a model's processor.

    Args:
        model_id: `model.id` of a recipe.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the processor.

    Raises:
        UserError: the processor cannot be loaded, or does not take images.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(
            resolve(model_id), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("processor", model_id, error) from None
    if not hasattr(processor, "image_processor"):
        raise UserError(
            "this is not a vision-language model: it has no image processor",
            field="model.id",
            value=model_id,
            fix="use a vision-language model; docs/models.md lists the families",
        )
    give_template(processor)
    return processor


def cannot_load(what: str, model_id: str, error: Exception) -> UserError:
    """Make the error for a model or processor that transformers could not load.

    Args:
        what: `model` or `processor`.
        model_id: `model.id` of a recipe.
        error: what transformers raised.
    """
    text = str(error).strip()
    if "trust_remote_code" in text:
        return UserError(
            f"the {what} comes with Python code, which loading it would run",
            field="model.trust_remote_code",
            value=False,
            fix=f"read the code of {model_id}; if you trust it, pin model.revision and set this to true",
        )
    if isinstance(error, pickle.UnpicklingError):
        return UserError(
            "the pickled weights contain more than tensors, so they are not loaded",
            field="model.id",
            value=model_id,
            fix=f"convert {model_id} to safetensors",
        )
    if what == "model" and _only_pickled(model_id, text):
        return UserError(
            "there are no safetensors weights, only pickled ones (.bin), which can run code when loaded",
            field="model.allow_pickle",
            value=False,
            fix=f"convert {model_id} to safetensors, or set this to true if you trust it",
        )
    return UserError(
        f"the {what} cannot be loaded: {text.splitlines()[0] if text else type(error).__name__}",
        field="model.id",
        value=model_id,
        fix="use a folder in Hugging Face layout, a name on the hub (with a network), or orpo-ray/tiny-smolvlm",
    )


def _only_pickled(model_id: str, text: str) -> bool:
    """Whether loading failed only because there are no safetensors."""
    folder = Path(resolve(model_id))
    if folder.is_dir():
        return SAFE_WEIGHTS in text and any(folder.glob("pytorch_model*.bin"))
    return SAFE_WEIGHTS in text and "use_safetensors" in text
