"""Which ways of tuning cannot go together, why, and the nearest that can. The recipe asks here as it is read.

What stands here was tried: each rule is a run that fails or that trains something else than it says. What is not
here works, and the tests show it (`tests/test_tuning.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from orpo_ray.config.schema import DeepspeedConfig, ModelConfig


class Sections(Protocol):
    """What of a recipe the rules look at."""

    model: ModelConfig
    deepspeed: DeepspeedConfig


@dataclass(frozen=True)
class Rule:
    """One combination that is refused.

    what: the combination. field: the recipe key to change. why, nearest: the reason, and what to write instead.
    finds: the names in a recipe that make the combination up; none if it does not have it.
    """

    what: str
    field: str
    why: str
    nearest: str
    finds: Callable[[Sections], Sequence[str]]

    def message(self, found: Sequence[str]) -> str:
        """For the user: field, what was found, why, and the nearest that works."""
        return f"{self.field}: {self.what} ({', '.join(found)}): {self.why}; nearest that works: {self.nearest}"


def _quantized_without_adapters(recipe: Sections) -> Sequence[str]:
    model = recipe.model
    return ["no model.lora"] if model.quantization is not None and model.lora is None else []


def _storage_of_another_type(recipe: Sections) -> Sequence[str]:
    quantization, dtype = recipe.model.quantization, recipe.model.dtype
    if quantization is None or quantization.quant_storage == "uint8" or dtype in ("auto", quantization.quant_storage):
        return []
    return [f"{quantization.quant_storage} in a {dtype} model"]


def _quantized_and_saved(recipe: Sections) -> Sequence[str]:
    lora = recipe.model.lora
    if recipe.model.quantization is None or lora is None:
        return []
    return [name for name in lora.modules_to_save if name == "language"]


def _dora_on_4_bits_sharded(recipe: Sections) -> Sequence[str]:
    model = recipe.model
    if model.quantization is None or model.lora is None or not model.lora.use_dora:
        return []
    return ["zero_stage 3"] if recipe.deepspeed.zero_stage == 3 else []


def _adapters_on_frozen(recipe: Sections) -> Sequence[str]:
    return [name for name in _targets(recipe) if name in recipe.model.freeze]


def _saved_in_frozen(recipe: Sections) -> Sequence[str]:
    lora = recipe.model.lora
    return [name for name in lora.modules_to_save if name in recipe.model.freeze] if lora is not None else []


def _adapted_and_saved(recipe: Sections) -> Sequence[str]:
    lora = recipe.model.lora
    return [name for name in lora.modules_to_save if name in _targets(recipe)] if lora is not None else []


def _cached_and_sharded(recipe: Sections) -> Sequence[str]:
    return ["zero_stage 3"] if recipe.model.vision_cache is not None and recipe.deepspeed.zero_stage == 3 else []


def _cached_and_trained(recipe: Sections) -> Sequence[str]:
    model = recipe.model
    if model.vision_cache is None:
        return []
    if model.lora is None:
        return [f"{part} is trained" for part in ("vision", "connector") if part not in model.freeze]
    wanted = (*_targets(recipe), *model.lora.modules_to_save)
    return [f"{part} is trained" for part in ("vision", "connector") if part in wanted]


def _targets(recipe: Sections) -> Sequence[str]:
    lora = recipe.model.lora
    return [] if lora is None else lora.target_modules or ["language"]


RULES = (
    Rule(
        "quantisation without LoRA",
        "model.quantization",
        "4-bit weights cannot be trained themselves, only adapters on them",
        "add model.lora, or leave model.quantization out",
        _quantized_without_adapters,
    ),
    Rule(
        "packed weights in another floating point type than the model's",
        "model.quantization.quant_storage",
        "the engine casts floating point weights to the model's type, and packed bits are no numbers",
        "quant_storage: uint8",
        _storage_of_another_type,
    ),
    Rule(
        "quantisation and the language model trained in full",
        "model.lora.modules_to_save",
        "its weights are in 4 bits, which cannot be trained themselves",
        "target_modules: [language]",
        _quantized_and_saved,
    ),
    Rule(
        "DoRA on 4-bit weights with ZeRO-3",
        "deepspeed.zero_stage",
        "DoRA unpacks a layer's weight outside the layer, where ZeRO-3 has not gathered it",
        "zero_stage: 2, or use_dora: false",
        _dora_on_4_bits_sharded,
    ),
    Rule(
        "adapters on a frozen part",
        "model.freeze",
        "with LoRA every weight is frozen anyway, and model.freeze names the parts that take no adapter",
        "leave the part out of model.freeze, or name other parts in model.lora.target_modules",
        _adapters_on_frozen,
    ),
    Rule(
        "a frozen part trained in full",
        "model.freeze",
        "model.lora.modules_to_save trains it",
        "leave the part out of one of the two",
        _saved_in_frozen,
    ),
    Rule(
        "the same modules adapted and trained in full",
        "model.lora.modules_to_save",
        "an adapter adds nothing to a weight that is trained itself",
        "leave them out of modules_to_save, or name other target_modules",
        _adapted_and_saved,
    ),
    Rule(
        "a cache of features that training changes",
        "model.vision_cache",
        "features change with the weights that make them",
        "freeze: [vision, connector], or leave model.vision_cache out",
        _cached_and_trained,
    ),
    Rule(
        "a cache of features with ZeRO-3",
        "model.vision_cache",
        "the vision part is gathered from all workers whenever one of them runs it, and they miss other images",
        "zero_stage: 2, or leave model.vision_cache out",
        _cached_and_sharded,
    ),
)


def refusals(recipe: Sections) -> list[str]:
    """One message for every rule that a recipe breaks."""
    return [rule.message(found) for rule in RULES if (found := rule.finds(recipe))]
