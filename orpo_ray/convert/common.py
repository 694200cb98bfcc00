"""Fields that the configs of TRL, LLaMA-Factory and ms-swift share: those of transformers' TrainingArguments."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from orpo_ray.convert.defaults import BETA
from orpo_ray.convert.draft import Draft, as_number, is_true

_SIZED = "tasks and batches are sized by the run itself"
WITHOUT_COUNTERPART = {
    "logging_steps": "", "logging_strategy": "", "logging_first_step": "", "overwrite_output_dir": "", "do_train": "",
    "do_eval": "", "plot_loss": "", "log_level": "", "save_strategy": "", "eval_strategy": "",
    "evaluation_strategy": "",
    "resume_from_checkpoint": "the same train command resumes",
    "dataloader_num_workers": _SIZED, "dataset_num_proc": _SIZED, "preprocessing_num_workers": _SIZED,
    "dataloader_pin_memory": "", "remove_unused_columns": "", "ddp_timeout": "see scaling.timeout_s",
    "per_device_eval_batch_size": _SIZED, "eval_batch_size": _SIZED, "packing": "pairs are always packed",
    "sample_packing": "pairs are always packed", "pad_to_sequence_len": "", "padding_free": "pairs are always packed",
    "group_by_length": "pairs are packed by their lengths", "tf32": "", "seed_data": "",
    "attn_implementation": "model.attention chooses", "attn_impl": "model.attention chooses",
    "flash_attn": "model.attention chooses", "flash_attention": "model.attention chooses",
    "sdp_attention": "model.attention chooses", "xformers_attention": "model.attention chooses",
    "gradient_checkpointing_kwargs": "",
    "config_file": "accelerate's config is not read; set deepspeed.zero_stage and scaling.num_workers as it does",
    "push_to_hub": "orpo-ray export RUN --push", "save_only_model": "",
    "hub_model_id": "orpo-ray export RUN --push", "disable_tqdm": "", "use_cpu": "",
}  # fmt: skip
MANY_EPOCHS = 10_000.0  # the most that a recipe can have
_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip


def put_training(draft: Draft, gpus: int) -> None:
    """Carry over batch, schedule, precision, checkpoints and evaluation.

    Args:
        draft: the draft.
        gpus: GPUs of the run, as far as the config says.
    """
    draft.move(("learning_rate",), "optim.learning_rate", float)
    draft.move(("num_train_epochs", "num_epochs"), "optim.epochs", float)
    for name in ("weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"):
        draft.move((name,), f"optim.{name}", float)
    draft.move(("seed",), "optim.seed", int)
    draft.move(("save_total_limit",), "checkpoint.keep", int)
    steps = draft.take_number(("max_steps",), "optim.max_steps", int)
    if steps is not None and steps > 0:
        draft.put("optim.max_steps", steps)
        draft.put("optim.epochs", MANY_EPOCHS)  # theirs have no effect then
    _put_batch(draft, gpus)
    _put_warmup(draft)
    _put_schedule(draft)
    _put_precision(draft)
    for theirs, ours in (("save_steps", "checkpoint.every_steps"), ("eval_steps", "eval.every_steps")):
        value = draft.take_number((theirs,), ours)
        if value is not None and value >= 1:
            draft.put(ours, int(value))
        elif value is not None:
            draft.note(theirs, value, f"a fraction of the run; {ours} is a number of steps")
    if (value := draft.take("optim", "optimizer")) is not None:
        if str(value) in _OPTIMIZERS:
            draft.put("optim.optimizer", _OPTIMIZERS[str(value)])
        else:
            draft.note("optim", value, "AdamW is used (optim.optimizer)")
    put_deepspeed(draft)
    if is_true(draft.take("gradient_checkpointing")):
        draft.put("model.gradient_checkpointing", "auto")
    trackers = draft.take("report_to")
    names = trackers if isinstance(trackers, list) else [trackers]
    if "wandb" in names:
        draft.put("tracking.wandb.enabled", True)
    for name in names:
        if name not in ("wandb", "none", "all", None):
            draft.note("report_to", name, "metrics go to metrics.jsonl and W&B")


def put_name(draft: Draft, default: str) -> None:
    """Carry over where the run is written: `output_dir` is `<checkpoint.storage>/<name>`."""
    output, name = draft.take_text("output_dir", "checkpoint.storage"), draft.take_text("run_name", "name")
    path = PurePosixPath((output or default).rstrip("/") or default)
    draft.recipe = {"name": run_name(name or path.name)} | draft.recipe
    if output is not None and len(path.parts) > 1:
        draft.put("checkpoint.storage", str(path.parent))


def run_name(text: str) -> str:
    """Turn a text into a name that a run can have."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    return cleaned[:90] or "converted"


def put_deepspeed(draft: Draft) -> None:
    """Carry over a DeepSpeed config by its name, such as `zero2`, `ds_z3_config.json` or `zero3_offload`."""
    value = draft.take("deepspeed")
    if value is None:
        return
    found = re.search(r"(?:zero_?|z|stage_?)([0-3])", str(value).lower())
    if not isinstance(value, str) or found is None:
        draft.note("deepspeed", value, "set deepspeed.zero_stage")
        return
    draft.put("deepspeed.zero_stage", int(found[1]))
    if "offload" in value.lower():
        draft.put("deepspeed.offload_optimizer", "cpu")


def put_objective(draft: Draft, loss: str, *betas: str) -> None:
    """Carry over the loss; DPO and others that need a reference model become ORPO.

    Args:
        draft: the draft.
        loss: their name of the loss.
        betas: their names of the loss's beta.
    """
    if loss in ("orpo", "odds_ratio"):
        draft.move(betas, "orpo.beta", float)
    elif loss in ("simpo", "cpo"):
        draft.put("objective.name", loss)
        draft.move(betas, "objective.beta", float)
        if loss == "simpo":
            draft.move(("simpo_gamma",), "objective.gamma", float)
    else:
        draft.note("loss", loss, "needs a reference model or other data; this recipe trains ORPO, which needs neither")
        name, beta = draft.take_named(*betas)
        if beta is not None and str(beta) != str(BETA):
            draft.note(name, beta, f"the beta of {loss} has another meaning; ORPO's default is kept")
    draft.take("simpo_gamma")


def _put_batch(draft: Draft, gpus: int) -> None:
    batch = draft.take_named("per_device_train_batch_size", "micro_batch_size", "batch_size")
    accumulation = draft.take_named("gradient_accumulation_steps")
    pairs = gpus
    for name, value in (batch, accumulation):
        try:
            count = 1 if value is None else as_number(value, int)
        except ValueError:
            count = 0
        if count < 1:
            draft.note(name, value, "not a number of 1 or more; set optim.pairs_per_step")
        pairs *= max(0, count)
    if not pairs:
        return
    draft.put("optim.pairs_per_step", pairs)
    if gpus > 1:
        draft.put("scaling.num_workers", gpus)
    else:
        name, value = batch
        reason = f"pairs_per_step is {pairs} for one GPU; multiply it by your number of GPUs"
        draft.note(name, 1 if value is None else value, reason)


def _put_warmup(draft: Draft) -> None:
    steps = draft.take_number(("warmup_steps",), "optim.warmup")
    ratio = draft.take_number(("warmup_ratio",), "optim.warmup")
    draft.put("optim.warmup", ratio if ratio is not None and not steps else steps)


def _put_schedule(draft: Draft) -> None:
    name = draft.take("lr_scheduler_type", "lr_scheduler")
    if name is None:
        return
    ours = next((ours for ours in ("cosine", "constant", "linear") if str(name).startswith(ours)), None)
    if ours is not None:
        draft.put("optim.schedule", ours)
    if ours != name:
        draft.note("lr_scheduler_type", name, f"{ours or 'linear'} is the nearest schedule")


def _put_precision(draft: Draft) -> None:
    bf16, fp16, dtype = draft.take("bf16"), draft.take("fp16"), draft.take("torch_dtype", "dtype")
    if is_true(bf16) or dtype in ("bfloat16", "bf16"):
        draft.put("model.dtype", "bfloat16")
    elif dtype in ("float32", "fp32"):
        draft.put("model.dtype", "float32")
    elif is_true(fp16) or dtype in ("float16", "fp16"):
        draft.note("fp16", True, "float16 is not used; model.dtype is bfloat16 or float32")
