"""The configs of TRL, LLaMA-Factory, ms-swift and axolotl, each as a function that fills a draft."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orpo_ray.convert.common import (
    WITHOUT_COUNTERPART,
    hub_source,
    put_name,
    put_objective,
    put_training,
)
from orpo_ray.convert.defaults import SWIFT_LEARNING_RATES, SWIFT_PAIRS_PER_STEP
from orpo_ray.convert.draft import Draft, is_true

_TEMPLATE = "the processor's own chat template is used"
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
    _put_trl_data(draft)
    draft.move(("max_length",), "data.max_length", int)
    loss = str(draft.take("loss_type") or ("orpo" if draft.theirs.get("rpo_alpha") is None else "dpo"))
    put_objective(draft, loss, draft.take("beta"), draft.take("simpo_gamma"))
    if loss == "orpo":
        draft.put("orpo.nll", "prompt+response")  # as TRL computes it
    if is_true(draft.take("use_peft")):
        _put_lora(draft, "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
    _put_four_bits(draft)
    put_training(draft, gpus)
    draft.drop(WITHOUT_COUNTERPART | {"max_prompt_length": "prompts are never cut", "disable_dropout": ""})
    draft.drop({"max_completion_length": "data.on_too_long: truncate_response cuts answers to data.max_length"})


def _put_trl_data(draft: Draft) -> None:
    name, mixture = draft.take("dataset_name"), draft.take("datasets")
    split, held_out = draft.take("dataset_train_split"), draft.take("dataset_test_split")
    evaluates = draft.theirs.get("eval_strategy") not in (None, "no", False)
    names = [str(each.get("path")) for each in mixture] if isinstance(mixture, list) else [str(name)] if name else []
    draft.put("data.train", [hub_source(each, split) for each in names] or None)
    if evaluates and names:
        draft.put("data.eval", hub_source(names[0], held_out or "test"))
    draft.drop({"dataset_config": "name the files of the configuration in data.train", "dataset_streaming": ""})


def fill_llamafactory(draft: Draft, folder: Path, gpus: int) -> None:
    """LLaMA-Factory's YAML for `llamafactory-cli train`."""
    put_name(draft, "llamafactory")
    draft.move(("model_name_or_path",), "model.id", str)
    draft.move(("model_revision",), "model.revision", str)
    draft.move(("trust_remote_code",), "model.trust_remote_code", bool)
    _put_llamafactory_data(draft, folder)
    draft.move(("cutoff_len",), "data.max_length", int)
    stage, loss = str(draft.take("stage") or "dpo"), str(draft.take("pref_loss") or "sigmoid")
    put_objective(draft, loss if stage == "dpo" else stage, draft.take("pref_beta"), draft.take("simpo_gamma"))
    tuning = str(draft.take("finetuning_type") or "lora")
    if tuning == "lora":
        draft.defaults["lora_alpha"] = 2 * int(draft.theirs.get("lora_rank") or draft.defaults["lora_rank"])
        _put_lora(draft, "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target")
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


def _put_llamafactory_data(draft: Draft, folder: Path) -> None:
    names, where = draft.take("dataset"), folder / str(draft.take("dataset_dir") or "data")
    info = _dataset_info(where)
    sources = []
    for name in str(names).split(",") if names else []:
        entry = info.get(name.strip(), {})
        source = entry.get("hf_hub_url") or entry.get("file_name") or name.strip()
        is_file = "hf_hub_url" not in entry and "file_name" in entry
        sources.append(str(where / source) if is_file else hub_source(str(source)))
        if not entry and "/" not in name:
            draft.note("dataset", name, "a name in a dataset_info.json that is not here; name its file in data.train")
    draft.put("data.train", sources or None)
    draft.move(("media_dir", "image_dir"), "data.image_root", str)
    size = draft.take("val_size")
    if (held_out := draft.take("eval_dataset")) is not None:
        draft.put("data.eval", [hub_source(each.strip()) for each in str(held_out).split(",")])
    elif size is not None and 0 < float(size) < 1:
        draft.put("data.eval_fraction", float(size))
    elif size is not None:
        draft.note("val_size", size, "a number of rows; data.eval_fraction is a fraction")


def _dataset_info(folder: Path) -> Mapping[str, Any]:
    path = folder / "dataset_info.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def fill_swift(draft: Draft, folder: Path, gpus: int) -> None:
    """ms-swift's arguments for `swift rlhf`, from a YAML file or a shell script."""
    put_name(draft, "swift")
    draft.move(("model", "model_id_or_path"), "model.id", str)
    draft.move(("model_revision",), "model.revision", str)
    held_out = draft.take("val_dataset")
    for path, names in (("data.train", draft.take("dataset")), ("data.eval", held_out)):
        each = names if isinstance(names, list) else str(names).split() if names else []
        draft.put(path, [hub_source(str(name).partition("#")[0]) for name in each] or None)
        for name in each:
            if "#" in str(name):
                draft.note("dataset", name, "the number of rows after # is not carried over")
    if draft.theirs.get("max_length") is None:
        draft.note("max_length", None, "there, the limit is the model's own; here, data.max_length")
    draft.move(("max_length",), "data.max_length", int)
    ratio = draft.take("split_dataset_ratio")
    if ratio is not None and float(ratio) > 0 and held_out is None:
        draft.put("data.eval_fraction", float(ratio))
    put_objective(draft, str(draft.take("rlhf_type") or "dpo"), draft.take("beta"), draft.take("simpo_gamma"))
    tuning = str(draft.take("train_type", "tuner_type", "sft_type") or "lora")
    if tuning == "lora":
        _put_lora(draft, "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
    else:
        _put_freezing(draft, "freeze_vit", "freeze_aligner", "freeze_llm")
        draft.drop({"lora_rank": "", "lora_alpha": "", "target_modules": ""})
        if tuning != "full":
            draft.note("train_type", tuning, "full fine-tuning or LoRA are what there is")
    _put_four_bits(draft)
    batch = str(draft.theirs.get("per_device_train_batch_size") or 1)
    pairs = (int(batch) if batch.isdigit() else 1) * gpus
    draft.defaults |= {
        "learning_rate": SWIFT_LEARNING_RATES["full" if tuning == "full" else "lora"],
        "gradient_accumulation_steps": max(1, math.ceil(SWIFT_PAIRS_PER_STEP / max(1, pairs))),
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
    for path, names in (("data.train", draft.take("datasets")), ("data.eval", draft.take("test_datasets"))):
        entries = [each if isinstance(each, dict) else {"path": each} for each in names or []]
        draft.put(path, [hub_source(str(each.get("path")), each.get("split")) for each in entries] or None)
        for each in entries:
            fields = {name: value for name, value in each.items() if name.startswith("field_")}
            if fields:
                draft.note("datasets", fields, "name other columns in data.columns")
    draft.move(("sequence_len",), "data.max_length", int)
    size = draft.take("val_set_size")
    if size is not None and 0 < float(size) < 1:
        draft.put("data.eval_fraction", float(size))
    elif size is not None and float(size) >= 1:
        draft.note("val_set_size", size, "a number of rows; data.eval_fraction is a fraction")
    loss = str(draft.take("rl") or "sft")
    put_objective(draft, loss, draft.take("orpo_alpha", "rl_beta", "dpo_beta"), draft.take("simpo_gamma"))
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
        names = value if isinstance(value, list) else re.split(r"[,\s]+", str(value)) if value else []
        if names and not set(names) & set(_ALL_LINEAR):
            draft.put(path, [str(name) for name in names])


def _put_four_bits(draft: Draft) -> None:
    bits = draft.take("quantization_bit", "quant_bits")
    if is_true(draft.take("load_in_4bit")) or (bits is not None and int(bits) == 4):
        kind = draft.take("bnb_4bit_quant_type", "quantization_type")
        draft.put("model.quantization", {"quant_type": kind} if kind in ("nf4", "fp4") else {})
    elif is_true(draft.take("load_in_8bit")) or bits is not None:
        draft.note("load_in_8bit", True, "weights are in 4 bits or not quantized (model.quantization)")
    draft.drop({"load_in_8bit": "", "quant_method": "", "quantization_method": "", "double_quantization": "",
                "bnb_4bit_compute_dtype": "", "use_bnb_nested_quant": ""})  # fmt: skip


def _put_freezing(draft: Draft, vision: str, connector: str, language: str) -> None:
    """Carry over frozen parts of a full fine-tuning; both projects freeze vision encoder and connector by default."""
    parts = {"vision": (vision, True), "connector": (connector, True), "language": (language, False)}
    values = {part: draft.take(name) for part, (name, _) in parts.items()}
    frozen = [
        part for part, (_, default) in parts.items() if (default if values[part] is None else is_true(values[part]))
    ]
    draft.put("model.freeze", frozen or None)
