"""Which facts hold for a model: those that stand in `families`, or what its transformers class tells of itself."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from orpo_ray.errors import UserError
from orpo_ray.model.families import FAMILIES, Family

_VISION = ("vision_tower", "vision_model", "visual", "vision_encoder", "vision_backbone")
_LANGUAGE = ("language_model", "text_model")


def family_of(config: Any) -> Family:
    """The facts of a model with this transformers config. Raises UserError that says what is missing."""
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    kind: Any = type(config)
    return _derived(config.model_type, kind, config.to_json_string())


@lru_cache
def _derived(model_type: str, config_class: Any, config: str) -> Family:
    """What can be read off the class of an unknown family; `config` is its JSON."""
    import json

    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if config_class not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _unknown(model_type, "transformers has no image-text-to-text model for it")
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
    with torch.device("meta"):
        model = kind(config_class(**json.loads(config)))
    base = getattr(model, "model", None)
    if base is None or not hasattr(base, "get_image_features"):
        raise _unknown(model_type, f"{kind.__name__} does not encode images apart (get_image_features)")
    takes = inspect.signature(base.forward).parameters
    if "mm_encoder_outputs" not in takes:
        raise _unknown(model_type, f"{kind.__name__} takes no images that were encoded before (mm_encoder_outputs)")
    if "token_type_ids" in takes:
        raise _unknown(model_type, f"{kind.__name__} wants token_type_ids, whose meaning differs by family")
    vision = next((name for name in _VISION if hasattr(base, name)), None)
    language = next((name for name in _LANGUAGE if hasattr(base, name)), None)
    if vision is None or language is None:
        parts = ", ".join(name for name, _ in base.named_children())
        raise _unknown(model_type, f"which of its parts sees and which speaks is not plain ({parts})")
    others = {name.split(".")[0] for name, _ in base.named_parameters()} - {vision, language}
    connector = tuple(f"model.{name}" for name in sorted(others))
    if not connector and hasattr(getattr(base, vision), "merger"):
        connector = (f"model.{vision}.merger.",)
    return Family(
        vision=(f"model.{vision}.",),
        connector=connector,
        language=(f"model.{language}.",),
        image_inputs=tuple(inspect.signature(base.get_image_features).parameters),
        token_types="mm_token_type_ids" if "mm_token_type_ids" in takes else None,
        multi_axis_positions=hasattr(base, "get_rope_index"),
        is_derived=True,
    )


def _unknown(model_type: str, missing: str) -> UserError:
    return UserError(
        f"this model family is not known, and its facts cannot be derived: {missing}",
        field="model.id",
        value=model_type,
        fix=f"use one of {', '.join(FAMILIES)}",
    )
