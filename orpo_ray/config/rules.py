"""Combinations of tuning options that are not supported, each with the reason and an alternative.

A recipe is checked against these rules when it is read. Each rule stands for a run that failed, or trained something
other than the recipe says. Combinations without a rule are tested to work:
`tests/integration/test_tuning_engines.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from orpo_ray.config.field_types import OtherImage
from orpo_ray.config.schema import DeepspeedConfig, ModelConfig, OptimConfig

# Settings of DeepSpeed that follow from the recipe, with the field that decides each.
DECIDED_BY = {
    "train_batch_size": "optim.pairs_per_step",
    "train_micro_batch_size_per_gpu": "optim.tokens_per_microbatch",
    "gradient_accumulation_steps": "optim.pairs_per_step",
    "managed_gradient_accumulation": "optim.pairs_per_step",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim.optimizer",
    "scheduler": "optim.schedule",
    "zero_allow_untested_optimizer": "optim.optimizer",
    "zero_force_ds_cpu_optimizer": "deepspeed.offload_optimizer",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "communication_data_type": "model.dtype",
    "activation_checkpointing": "model.gradient_checkpointing",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param": "deepspeed.offload_param",
    "zero_optimization.cpu_offload_param": "deepspeed.offload_param",
}


class TuningOptions(Protocol):
    """The sections of a recipe that the rules read."""

    model: ModelConfig
    optim: OptimConfig
    deepspeed: DeepspeedConfig

    @property
    def other_image(self) -> OtherImage | None:
        """Which images the chosen answers are contrasted with."""


@dataclass(frozen=True)
class Rule:
    """One combination of options that is refused."""

    combination: str
    """The combination, in words."""
    field: str
    """Recipe key to change."""
    reason: str
    """Why the combination does not work."""
    alternative: str
    """The nearest setting that works."""
    find: Callable[[TuningOptions], Sequence[str]]
    """Returns the names in a recipe that form the combination; empty if the recipe does not have it."""

    def describe(self, found: Sequence[str]) -> str:
        """Return the error message for the names that `find` returned."""
        problem = f"{self.combination} ({', '.join(found)}) cannot work"
        return f"{self.field}: {problem}: {self.reason}\n    fix: {self.alternative}"


def find_conflicts(recipe: TuningOptions) -> list[str]:
    """Return an error message for each rule that a recipe breaks."""
    return [rule.describe(found) for rule in RULES if (found := rule.find(recipe))]


def _quantized_without_adapters(recipe: TuningOptions) -> Sequence[str]:
    model = recipe.model
    return ["no model.lora"] if model.quantization is not None and model.lora is None else []


def _storage_type_differs(recipe: TuningOptions) -> Sequence[str]:
    quantization, dtype = recipe.model.quantization, recipe.model.dtype
    if quantization is None or quantization.quant_storage == "uint8" or dtype in ("auto", quantization.quant_storage):
        return []
    return [f"{quantization.quant_storage} in a {dtype} model"]


def _quantized_and_saved(recipe: TuningOptions) -> Sequence[str]:
    lora = recipe.model.lora
    if recipe.model.quantization is None or lora is None:
        return []
    return [name for name in lora.modules_to_save if name == "language"]


def _quantized_dora_with_zero3(recipe: TuningOptions) -> Sequence[str]:
    model = recipe.model
    if model.quantization is None or model.lora is None or not model.lora.use_dora:
        return []
    return ["zero_stage 3"] if recipe.deepspeed.zero_stage == 3 else []


def _adapted_and_frozen(recipe: TuningOptions) -> Sequence[str]:
    return [name for name in _target_modules(recipe) if name in recipe.model.freeze]


def _saved_and_frozen(recipe: TuningOptions) -> Sequence[str]:
    lora = recipe.model.lora
    return [name for name in lora.modules_to_save if name in recipe.model.freeze] if lora is not None else []


def _adapted_and_saved(recipe: TuningOptions) -> Sequence[str]:
    lora = recipe.model.lora
    return [name for name in lora.modules_to_save if name in _target_modules(recipe)] if lora is not None else []


def _cached_with_zero3(recipe: TuningOptions) -> Sequence[str]:
    return ["zero_stage 3"] if recipe.model.vision_cache is not None and recipe.deepspeed.zero_stage == 3 else []


def _cached_and_trained(recipe: TuningOptions) -> Sequence[str]:
    model = recipe.model
    if model.vision_cache is None:
        return []
    if model.lora is None:
        return [f"{part} is trained" for part in ("vision", "connector") if part not in model.freeze]
    trained = (*_target_modules(recipe), *model.lora.modules_to_save)
    return [f"{part} is trained" for part in ("vision", "connector") if part in trained]


def _cached_and_changed(recipe: TuningOptions) -> Sequence[str]:
    changes = recipe.model.vision_cache is not None and recipe.other_image in ("crop", "noise")
    return [f"other_image: {recipe.other_image}"] if changes else []


def _optimizer_offloaded_without_sharding(recipe: TuningOptions) -> Sequence[str]:
    is_offloaded = recipe.deepspeed.offload_optimizer != "none"
    return ["zero_stage 0"] if is_offloaded and recipe.deepspeed.zero_stage == 0 else []


def _optimizer_offloaded_in_8_bits(recipe: TuningOptions) -> Sequence[str]:
    is_offloaded = recipe.deepspeed.offload_optimizer != "none"
    return [recipe.optim.optimizer] if is_offloaded and recipe.optim.optimizer != "adamw" else []


def _weights_offloaded_below_zero3(recipe: TuningOptions) -> Sequence[str]:
    stage = recipe.deepspeed.zero_stage
    return [f"zero_stage {stage}"] if recipe.deepspeed.offload_param != "none" and stage < 3 else []


def _config_without_deepspeed(recipe: TuningOptions) -> Sequence[str]:
    return ["zero_stage 0"] if recipe.deepspeed.config and recipe.deepspeed.zero_stage == 0 else []


def _config_contradicts(recipe: TuningOptions) -> Sequence[str]:
    found = []
    for key, field in DECIDED_BY.items():
        section, _, name = key.rpartition(".")
        settings = recipe.deepspeed.config.get(section, {}) if section else recipe.deepspeed.config
        if isinstance(settings, dict) and name in settings:
            found.append(f"{key}: {settings[name]!r}, see {field}")
    return found


def _config_is_no_mapping(recipe: TuningOptions) -> Sequence[str]:
    zero = recipe.deepspeed.config.get("zero_optimization", {})
    return [] if isinstance(zero, dict) else [f"zero_optimization: {zero!r}"]


def _target_modules(recipe: TuningOptions) -> Sequence[str]:
    lora = recipe.model.lora
    return [] if lora is None else lora.target_modules or ["language"]


RULES = (
    Rule(
        "quantization without LoRA",
        "model.quantization",
        "4-bit weights cannot be trained; only adapters on them can",
        "add model.lora, or remove model.quantization",
        _quantized_without_adapters,
    ),
    Rule(
        "a quant_storage other than the model's dtype",
        "model.quantization.quant_storage",
        "the engine casts floating-point tensors to the model's dtype, which would corrupt packed 4-bit weights",
        "quant_storage: uint8",
        _storage_type_differs,
    ),
    Rule(
        "the quantized language model in modules_to_save",
        "model.lora.modules_to_save",
        "4-bit weights cannot be trained; only adapters on them can",
        "target_modules: [language]",
        _quantized_and_saved,
    ),
    Rule(
        "DoRA on 4-bit weights with ZeRO-3",
        "deepspeed.zero_stage",
        "DoRA reads a layer's weight outside the layer's forward pass, where ZeRO-3 has not gathered it",
        "zero_stage: 2, or use_dora: false",
        _quantized_dora_with_zero3,
    ),
    Rule(
        "adapters on a frozen part",
        "model.freeze",
        "with LoRA, model.freeze names the parts of the model that get no adapter",
        "remove the part from model.freeze or from model.lora.target_modules",
        _adapted_and_frozen,
    ),
    Rule(
        "a frozen part in modules_to_save",
        "model.freeze",
        "model.lora.modules_to_save trains the part that model.freeze freezes",
        "remove the part from one of the two lists",
        _saved_and_frozen,
    ),
    Rule(
        "the same modules in target_modules and modules_to_save",
        "model.lora.modules_to_save",
        "a weight that is trained in full gains nothing from an adapter",
        "remove the modules from one of the two lists",
        _adapted_and_saved,
    ),
    Rule(
        "vision_cache with a trained vision encoder or connector",
        "model.vision_cache",
        "cached features are outdated as soon as these weights change",
        "freeze: [vision, connector], or remove model.vision_cache",
        _cached_and_trained,
    ),
    Rule(
        "vision_cache with ZeRO-3",
        "model.vision_cache",
        "under ZeRO-3 all workers must run the vision encoder together, but they have different images to compute",
        "zero_stage: 2, or remove model.vision_cache",
        _cached_with_zero3,
    ),
    Rule(
        "vision_cache with other images that differ in every epoch",
        "model.vision_cache",
        "the cache would grow in every epoch by features that no later one reads",
        "orpo.other_image: exchange, or remove model.vision_cache",
        _cached_and_changed,
    ),
    Rule(
        "an offloaded optimizer without sharding",
        "deepspeed.offload_optimizer",
        "without sharding, every worker would keep and update all states in the main memory of its node",
        "zero_stage: 1 to 3, or offload_optimizer: none",
        _optimizer_offloaded_without_sharding,
    ),
    Rule(
        "an offloaded optimizer with 8-bit states",
        "deepspeed.offload_optimizer",
        "bitsandbytes updates 8-bit states on the GPU; offloaded ones are in main memory",
        "optim.optimizer: adamw, or offload_optimizer: none",
        _optimizer_offloaded_in_8_bits,
    ),
    Rule(
        "offloaded weights without ZeRO-3",
        "deepspeed.offload_param",
        "only ZeRO-3 divides weights and gathers them for each use; other stages need them whole on the GPU",
        "zero_stage: 3, or offload_param: none",
        _weights_offloaded_below_zero3,
    ),
    Rule(
        "settings of DeepSpeed in a run without it",
        "deepspeed.config",
        "stage 0 runs on PyTorch alone",
        "zero_stage: 1 to 3, or remove deepspeed.config",
        _config_without_deepspeed,
    ),
    Rule(
        "settings that the recipe decides",
        "deepspeed.config",
        "a run would not do what its recipe says",
        "set the fields of the recipe, and remove these settings",
        _config_contradicts,
    ),
    Rule(
        "a setting that is not a mapping",
        "deepspeed.config",
        "DeepSpeed reads the settings of ZeRO from a mapping",
        "zero_optimization: {name: value}",
        _config_is_no_mapping,
    ),
)
