"""The configs of TRL, LLaMA-Factory, ms-swift and axolotl, each as a function that fills a draft."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orpo_ray.convert.common import WITHOUT_COUNTERPART, put_name, put_objective, put_training
from orpo_ray.convert.datasets import (
    put_entries,
    put_eval_fraction,
    put_llamafactory_data,
    put_swift_data,
    put_trl_data,
)
from orpo_ray.convert.defaults import SWIFT_LEARNING_RATES, SWIFT_PAIRS_PER_STEP
from orpo_ray.convert.draft import Draft, is_true

_TEMPLATE = "the processor's own chat template is used"
# Fields of TRL's DPOConfig that ORPOConfig and CPOConfig lack, with two of earlier versions.
_OF_DPO = (
    "precompute_ref_log_probs", "loss_weights", "ld_alpha", "f_divergence_type", "use_weighting", "discopop_tau",
    "sync_ref_model", "rpo_alpha", "reference_free",
)  # fmt: skip
# Without a meaning for a recipe.
_OF_AXOLOTL = (
    "model_type", "tokenizer_type", "processor_type", "dataset_prepared_path", "skip_prepare_dataset", "strict",
)  # fmt: skip
_PIXELS = "the processor decides"
_ALL_LINEAR = ("all", "all-linear", "ALL")


def fill_trl(draft: Draft, folder: Path, gpus: int) -> None:
    """TRL's ORPOConfig, CPOConfig or DPOConfig with ModelConfig and ScriptArguments, as `trl --config` reads them."""
    put_name(draft, "trl")
    draft.move(("model_name_or_path",), "model.id", str)
    draft.move(("model_revision",), "model.revision", str)
    draft.move(("trust_remote_code",), "model.trust_remote_code", bool)
    put_trl_data(draft)
    draft.move(("max_length",), "data.max_length", int)
    loss = _trl_loss(draft)
    put_objective(draft, loss, "beta")
    if loss == "orpo":
        draft.put("orpo.nll", "prompt+response")  # as TRL computes it
    if is_true(draft.take("use_peft")):
        _put_lora(draft, "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
    _put_four_bits(draft)
    put_training(draft, gpus)
    draft.drop(WITHOUT_COUNTERPART | {"max_prompt_length": "prompts are never cut", "disable_dropout": ""})
    draft.drop({"max_completion_length": "data.on_too_long: truncate_response cuts answers to data.max_length"})


def _trl_loss(draft: Draft) -> str:
    """Find the loss. `loss_type` has a default in DPOConfig and CPOConfig, and does not exist in ORPOConfig."""
    given = draft.take("loss_type")
    named = "+".join(map(str, given)) if isinstance(given, list) else str(given or "")
    if draft.trainer == "cpo" and named in ("", "sigmoid"):
        return "cpo"
    if draft.trainer not in (None, "orpo", "dpo"):
        return named or draft.trainer
    if named:
        return named
    if draft.trainer == "dpo" or any(draft.theirs.get(name) not in (None, False) for name in _OF_DPO):
        return "sigmoid"
    if draft.trainer is None:
        reason = "the config does not say which trainer it is for; ORPO is assumed, and beta may need another value"
        draft.note("loss_type", None, reason)
    return "orpo"


def fill_llamafactory(draft: Draft, folder: Path, gpus: int) -> None:
    """LLaMA-Factory's YAML for `llamafactory-cli train`."""
    put_name(draft, "llamafactory")
    draft.move(("model_name_or_path",), "model.id", str)
    draft.move(("model_revision",), "model.revision", str)
    draft.move(("trust_remote_code",), "model.trust_remote_code", bool)
    put_llamafactory_data(draft, folder)
    draft.move(("cutoff_len",), "data.max_length", int)
    stage, loss = str(draft.take("stage") or "dpo"), str(draft.take("pref_loss") or "sigmoid")
    put_objective(draft, loss if stage == "dpo" else stage, "pref_beta")
    tuning = str(draft.take("finetuning_type") or "lora")
    if tuning == "lora":
        draft.defaults["lora_alpha"] = 2 * draft.peek_number("lora_rank", draft.defaults["lora_rank"])
        _put_lora(draft, "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target")
        _put_freezing_with_lora(
            draft, "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model", by_default=True
        )
    elif tuning != "full":
        draft.note("finetuning_type", tuning, "full fine-tuning or LoRA are what there is")
    else:
        _put_freezing(draft, "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
    _put_four_bits(draft)
    put_training(draft, gpus)
    draft.drop(
        WITHOUT_COUNTERPART | {"template": "", "image_max_pixels": "the processor decides", "image_min_pixels": ""}
    )
    draft.drop({"max_samples": "optim.max_steps or fewer files", "overwrite_cache": "", "tokenized_path": ""})


def fill_swift(draft: Draft, folder: Path, gpus: int) -> None:
    """ms-swift's arguments for `swift rlhf`, from a YAML file or a shell script."""
    put_name(draft, "swift")
    draft.move(("model", "model_id_or_path"), "model.id", str)
    draft.move(("model_revision",), "model.revision", str)
    put_swift_data(draft)
    if draft.theirs.get("max_length") is None:
        draft.note("max_length", None, "there, the limit is the model's own; here, data.max_length")
    draft.move(("max_length",), "data.max_length", int)
    put_objective(draft, str(draft.take("rlhf_type") or "dpo"), "beta")
    tuning = str(draft.take("train_type", "tuner_type", "sft_type") or "lora")
    if tuning == "lora":
        _put_lora(draft, "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
        _put_freezing_with_lora(draft, "freeze_vit", "freeze_aligner", "freeze_llm", by_default=False)
    else:
        _put_freezing(draft, "freeze_vit", "freeze_aligner", "freeze_llm")
        draft.drop({"lora_rank": "", "lora_alpha": "", "target_modules": ""})
        if tuning != "full":
            draft.note("train_type", tuning, "full fine-tuning or LoRA are what there is")
    _put_four_bits(draft)
    pairs = draft.peek_number("per_device_train_batch_size", 1) * gpus
    draft.defaults |= {
        "learning_rate": SWIFT_LEARNING_RATES["full" if tuning == "full" else "lora"],
        "gradient_accumulation_steps": max(1, math.ceil(SWIFT_PAIRS_PER_STEP / pairs)),
    }
    put_training(draft, gpus)
    draft.drop(WITHOUT_COUNTERPART | {"ref_model": "no reference model is needed", "template": _TEMPLATE, "system": ""})
    draft.drop({"load_from_cache_file": "", "use_hf": "", "max_pixels": _PIXELS, "nproc_per_node": ""})


def fill_axolotl(draft: Draft, folder: Path, gpus: int) -> None:
    """axolotl's YAML."""
    put_name(draft, "axolotl")
    draft.move(("base_model",), "model.id", str)
    draft.move(("revision_of_model",), "model.revision", str)
    draft.move(("trust_remote_code",), "model.trust_remote_code", bool)
    put_entries(draft, "datasets", "data.train")
    put_entries(draft, "test_datasets", "data.eval")
    draft.move(("sequence_len",), "data.max_length", int)
    put_eval_fraction(draft, "val_set_size")
    loss = str(draft.take("rl") or "sft")
    put_objective(draft, loss, "orpo_alpha", "rl_beta", "dpo_beta")
    adapter = str(draft.take("adapter") or "")
    if adapter in ("lora", "qlora"):
        if is_true(draft.take("lora_target_linear")):
            draft.theirs.pop("lora_target_modules", None)
        _put_lora(draft, "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
    elif adapter:
        draft.note("adapter", adapter, "full fine-tuning or LoRA are what there is")
    if adapter == "qlora":
        draft.theirs["load_in_4bit"] = True
    _put_four_bits(draft)
    if (project := draft.take("wandb_project")) is not None:
        draft.put("tracking.wandb.enabled", True)
        draft.put("tracking.wandb.project", str(project))
    draft.move(("wandb_entity",), "tracking.wandb.entity", str)
    put_training(draft, gpus)
    times = "evals and saves are numbers of steps here"
    draft.drop(WITHOUT_COUNTERPART | {"evals_per_epoch": times, "saves_per_epoch": times})
    draft.drop({"chat_template": _TEMPLATE, "special_tokens": "the tokenizer's own are used"})
    draft.drop(dict.fromkeys(_OF_AXOLOTL, ""))


PROJECTS: dict[str, Callable[[Draft, Path, int], None]] = {
    "TRL": fill_trl,
    "LLaMA-Factory": fill_llamafactory,
    "ms-swift": fill_swift,
    "axolotl": fill_axolotl,
}


MODELS = frozenset({"base_model", "model", "model_id_or_path", "model_name_or_path"})


def project_of(theirs: Mapping[str, Any]) -> str | None:
    """Recognize whose config it is by its fields; None if it is nobody's."""
    if "base_model" in theirs:
        return "axolotl"
    if {"rlhf_type", "train_type", "tuner_type", "sft_type", "model_id_or_path"} & set(theirs):
        return "ms-swift"
    if "model_name_or_path" in theirs:
        factory = {"stage", "finetuning_type", "template", "cutoff_len", "pref_loss", "dataset"}
        return "LLaMA-Factory" if factory & set(theirs) else "TRL"
    return None


def _put_lora(draft: Draft, rank: str, alpha: str, dropout: str, targets: str, saved: str) -> None:
    """Carry over LoRA under their names of its options."""
    draft.put("model.lora", {})
    draft.move((rank,), "model.lora.r", int)
    draft.move((alpha,), "model.lora.alpha", float)
    draft.move((dropout,), "model.lora.dropout", float)
    for theirs, ours in (("use_rslora", "use_rslora"), ("use_dora", "use_dora"), ("peft_use_dora", "use_dora")):
        if is_true(draft.take(theirs)):
            draft.put(f"model.lora.{ours}", True)
    for theirs, path in ((targets, "model.lora.target_modules"), (saved, "model.lora.modules_to_save")):
        value = draft.take(theirs)
        names = re.split(r"[,\s]+", value) if isinstance(value, str) else [] if value is None else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            draft.note(theirs, value, f"not understood; it would be {path}")
        elif names and not set(names) & set(_ALL_LINEAR):
            draft.put(path, names)


def _put_four_bits(draft: Draft) -> None:
    name, bits = draft.take_named("quantization_bit", "quant_bits")
    if is_true(draft.take("load_in_4bit")) or str(bits) == "4":
        kind = draft.take("bnb_4bit_quant_type", "quantization_type")
        draft.put("model.quantization", {"quant_type": kind} if kind in ("nf4", "fp4") else {})
    elif bits is not None or is_true(draft.theirs.get("load_in_8bit")):
        name, bits = (name, bits) if bits is not None else ("load_in_8bit", True)
        draft.note(name, bits, "weights are in 4 bits or not quantized (model.quantization)")
    draft.drop({"load_in_8bit": "", "quant_method": "", "quantization_method": "", "double_quantization": "",
                "bnb_4bit_compute_dtype": "", "use_bnb_nested_quant": ""})  # fmt: skip


def _put_freezing_with_lora(draft: Draft, vision: str, connector: str, language: str, *, by_default: bool) -> None:
    """Carry over parts that get no adapter.

    Args:
        draft: the draft, with LoRA.
        vision, connector, language: their names of the fields that freeze a part.
        by_default: whether vision encoder and connector get no adapters unless their config says so.
    """
    named = "target_modules" in draft.recipe["model"]["lora"]  # these names match layers of all parts
    frozen = []
    for part, name in (("vision", vision), ("connector", connector), ("language", language)):
        value = draft.take(name)
        if (named or part == "language") and (is_true(value) or (value is None and by_default and part != "language")):
            frozen.append(part)
        elif is_true(value):
            draft.note(name, value, f"LoRA freezes the base weights anyway, and the {part} part gets no adapter")
        elif value is not None and part != "language" and not named:
            draft.note(name, value, f"adapters are in the language model; add {part} to model.lora.target_modules")
    draft.put("model.freeze", frozen or None)


def _put_freezing(draft: Draft, vision: str, connector: str, language: str) -> None:
    """Carry over frozen parts of a full fine-tuning; both projects freeze vision encoder and connector by default."""
    parts = {"vision": (vision, True), "connector": (connector, True), "language": (language, False)}
    values = {part: draft.take(name) for part, (name, _) in parts.items()}
    frozen = [
        part for part, (_, default) in parts.items() if (default if values[part] is None else is_true(values[part]))
    ]
    draft.put("model.freeze", frozen or None)
