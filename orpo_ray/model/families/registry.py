"""All known families, one entry each, by their config's `model_type`."""

from __future__ import annotations

from typing import Any

from orpo_ray.model.families.base import Family
from orpo_ray.model.families.cross_attention import IDEFICS, MLLAMA
from orpo_ray.model.families.derived import derived_family
from orpo_ray.model.families.gemma import GEMMA3, PALIGEMMA
from orpo_ray.model.families.idefics3 import IDEFICS2, IDEFICS3
from orpo_ray.model.families.llava_like import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, MISTRAL3
from orpo_ray.model.families.qwen_vl import QWEN_VL

FAMILIES: dict[str, Family] = {
    "smolvlm": IDEFICS3,
    "idefics": IDEFICS,
    "idefics2": IDEFICS2,
    "idefics3": IDEFICS3,
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
    "mistral3": MISTRAL3,
    "internvl": LLAVA,
    "gemma3": GEMMA3,
    "paligemma": PALIGEMMA,
    "mllama": MLLAMA,
    "qwen2_5_vl": QWEN_VL,
    "qwen3_vl": QWEN_VL,
}


def family_of(config: Any) -> Family:
    """The family of a model with this transformers config: its entry, fitted to the config, or what its class tells.

    Raises:
        UserError: there is no entry, and something cannot be derived.
    """
    known = FAMILIES.get(config.model_type)
    return derived_family(config, FAMILIES) if known is None else known.fitted(config)
