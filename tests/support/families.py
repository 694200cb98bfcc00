"""The tiny families as parameters of tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from orpo_ray.tiny_models.families import TINY_FAMILIES


def with_processor(families: Iterable[str] = TINY_FAMILIES) -> list[Any]:
    """Families for a test that builds their processors: those that need torchvision are marked so."""
    marks = {True: [pytest.mark.torchvision], False: []}
    return [pytest.param(family, marks=marks[TINY_FAMILIES[family].needs_torchvision]) for family in sorted(families)]


def tiny_unknown(model_type: str) -> Any:
    """Return a small model of a family that orpo-ray does not know."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    tiny = TINY_FAMILIES["llava"]()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    config = AutoConfig.for_model(
        model_type,
        vision_config={"model_type": "siglip_vision_model", **vision},
        text_config=tiny.text(model_type="cohere2"),
        image_token_index=tiny.token("<image>"),
        image_token_id=tiny.token("<image>"),
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config)
