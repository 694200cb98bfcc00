"""Families that are not in the registry: what can be read from the model's transformers class."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from orpo_ray.data.collate_images import ImageArrays, TokenRows, concatenate_images
from orpo_ray.data.packing import IMAGE, PairBatch
from orpo_ray.errors import UserError
from orpo_ray.model.families.base import Family, ImageFeatures, ImageTensors
from orpo_ray.model.families.idefics3 import PADDING_MASK, zero_padding
from orpo_ray.model.families.qwen_vl import QWEN_VL
from orpo_ray.processing.pixel_norm import PixelNorm

_VISION = ("vision_tower", "vision_model", "visual", "vision_encoder", "vision_backbone")
_LANGUAGE = ("language_model", "text_model")


@dataclass(frozen=True)
class DerivedFamily(Family):
    """A family of which only the class is known: concatenated layout, and the model's own logits."""

    model_type: str = ""
    """transformers' name of the family."""
    takes_token_types: bool = False
    """Whether the model's forward takes `mm_token_type_ids`."""

    def why_not_shared_prefix(self, config: Any) -> str | None:
        """Nothing proves that the paths are equal."""
        return f"the family {self.model_type} is not known, so its facts were derived from its class"

    def can_cache_images(self, config: Any) -> bool:
        """Features may depend on other images."""
        return False

    def collate(self, inputs: Sequence[ImageArrays], rows: TokenRows) -> dict[str, np.ndarray]:
        """Add a padding mask if the model takes one."""
        return concatenate_images(inputs, padding_mask=PADDING_MASK if PADDING_MASK in self.image_inputs else None)

    def vision_inputs(self, images: Mapping[str, torch.Tensor], norm: PixelNorm, dtype: torch.dtype) -> ImageTensors:
        """Padding stays 0 where there is a mask."""
        return zero_padding(super().vision_inputs(images, norm, dtype))

    def concatenated_inputs(self, batch: PairBatch) -> dict[str, Any]:
        """Token types, and image sizes if the model numbers positions by them."""
        if not self.takes_token_types:
            return {}
        if "image_grid_thw" in self.image_inputs:
            return QWEN_VL.concatenated_inputs(batch)
        return {"mm_token_type_ids": (batch.token_kind == IMAGE).int()}

    def hidden_states(self, base: Any, batch: PairBatch, images: ImageFeatures | None) -> torch.Tensor:
        """Logits at all positions: the head may do more than multiply, which nothing here knows."""
        logits: torch.Tensor = base(**self._forward_inputs(base, batch, images)).logits
        return logits

    def output_head(self, base: Any) -> None:
        """The model's own forward has run it."""
        return None

    def logits(self, base: Any, hidden: torch.Tensor) -> torch.Tensor:
        """What `hidden_states` computed, as a new tensor."""
        return hidden.clone()


class _NotDerivable(Exception):
    """Says what is missing."""


def derived_family(config: Any, known: Collection[str]) -> DerivedFamily:
    """Derive a family from its transformers config.

    Args:
        config: of the model.
        known: names of the families that need not be derived, for the message.

    Raises:
        UserError: something cannot be derived.
    """
    kind: Any = type(config)
    try:
        return _derived(config.model_type, kind, config.to_json_string())
    except _NotDerivable as missing:
        raise UserError(
            f"this model family is not known, and its facts cannot be derived: {missing}",
            field="model.id",
            value=config.model_type,
            fix=f"use one of {', '.join(known)}",
        ) from None


@lru_cache
def _derived(model_type: str, config_class: Any, config: str) -> DerivedFamily:
    """Derive from the config's class and its JSON."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if config_class not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _NotDerivable("transformers has no image-text-to-text model for it")
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
    with torch.device("meta"):
        model = kind(config_class(**json.loads(config)))
    base = getattr(model, "model", None)
    if base is None or not hasattr(base, "get_image_features"):
        raise _NotDerivable(f"{kind.__name__} cannot encode images separately (no get_image_features)")
    arguments = inspect.signature(base.forward).parameters
    if "mm_encoder_outputs" not in arguments:
        raise _NotDerivable(f"{kind.__name__} does not take images encoded before (no mm_encoder_outputs)")
    if "token_type_ids" in arguments:
        raise _NotDerivable(f"{kind.__name__} takes token_type_ids, whose meaning differs by family")
    vision = next((name for name in _VISION if hasattr(base, name)), None)
    language = next((name for name in _LANGUAGE if hasattr(base, name)), None)
    if vision is None or language is None:
        modules = ", ".join(name for name, _ in base.named_children())
        raise _NotDerivable(f"its vision encoder and language model cannot be told from its modules ({modules})")
    others = {name.split(".")[0] for name, _ in base.named_parameters()} - {vision, language}
    connector = tuple(f"model.{name}" for name in sorted(others))
    if not connector and hasattr(getattr(base, vision), "merger"):
        connector = (f"model.{vision}.merger.",)
    return DerivedFamily(
        vision=(f"model.{vision}.",),
        connector=connector,
        language=(f"model.{language}.",),
        image_inputs=tuple(inspect.signature(base.get_image_features).parameters),
        model_type=model_type,
        takes_token_types="mm_token_type_ids" in arguments,
    )
