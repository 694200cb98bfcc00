"""Configs of other trainers as recipes: with the fields that their shipped examples have."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_ray.config.load import load_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import LoraConfig
from orpo_ray.convert.convert import convert_config
from orpo_ray.errors import UserError
from support.commands import orpo_ray_here

FACTORY: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct", "trust_remote_code": True, "stage": "dpo", "do_train": True,
    "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "pref_beta": 0.2, "pref_loss": "orpo",
    "dataset": "rlhf_v", "template": "qwen3_vl_nothink", "cutoff_len": 2048, "max_samples": 1000, "logging_steps": 10,
    "preprocessing_num_workers": 16, "output_dir": "saves/qwen/orpo", "save_steps": 500, "plot_loss": True,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "learning_rate": 5.0e-6, "bf16": True,
    "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "ddp_timeout": 180000000,
    "resume_from_checkpoint": None, "report_to": "none", "image_max_pixels": 262144,
}  # fmt: skip
TRL: dict[str, Any] = {
    "model_name_or_path": "HuggingFaceTB/SmolVLM-256M-Instruct", "dataset_name": "trl-lib/rlaif-v", "beta": 0.1,
    "learning_rate": 8e-6, "max_length": 1024, "max_prompt_length": 512, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4, "num_train_epochs": 1, "eval_strategy": "steps", "eval_steps": 500,
    "output_dir": "smolvlm-orpo", "warmup_steps": 150, "report_to": ["wandb"], "use_peft": True, "lora_r": 16,
    "lora_alpha": 16, "lora_target_modules": "all-linear", "bf16": True, "logging_steps": 10,
}  # fmt: skip
SWIFT = {
    "rlhf_type": "orpo", "model": "Qwen/Qwen2.5-VL-3B-Instruct", "train_type": "full", "dataset": "swift/RLAIF-V#1000",
    "split_dataset_ratio": 0.01, "torch_dtype": "bfloat16", "num_train_epochs": 1, "per_device_train_batch_size": 4,
    "learning_rate": "1e-5", "gradient_accumulation_steps": 16, "deepspeed": "zero3_offload", "save_steps": 50,
    "eval_steps": 50, "save_total_limit": 2, "max_length": 2048, "output_dir": "output", "warmup_ratio": 0.05,
}  # fmt: skip
AXOLOTL = {
    "base_model": "llava-hf/llava-1.5-7b-hf", "processor_type": "AutoProcessor", "rl": "orpo", "orpo_alpha": 0.3,
    "datasets": [{"path": "me/pairs", "type": "chat_template.argilla", "split": "train"}], "val_set_size": 0.05,
    "adapter": "qlora", "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True,
    "sequence_len": 4096, "sample_packing": False, "micro_batch_size": 2, "gradient_accumulation_steps": 4,
    "num_epochs": 4, "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine", "learning_rate": 2e-4, "bf16": "true",
    "gradient_checkpointing": True, "warmup_steps": 10, "evals_per_epoch": 4, "wandb_project": "mine",
    "output_dir": "./outputs/qlora-out", "chat_template": "llava", "special_tokens": {"pad_token": "<pad>"},
}  # fmt: skip
CASES = {
    "factory": FACTORY,
    "factory-full": FACTORY | {"finetuning_type": "full", "deepspeed": "examples/deepspeed/ds_z3_config.json"},
    "factory-dpo": FACTORY | {"pref_loss": "sigmoid"},
    "factory-simpo": FACTORY | {"pref_loss": "simpo", "simpo_gamma": 0.5, "pref_beta": 2.0},
    "factory-4bit": FACTORY | {"quantization_bit": 4, "lora_target": "q_proj,v_proj", "val_size": 0.1},
    "factory-8bit": FACTORY | {"quantization_bit": 8, "fp16": True, "bf16": False},
    "factory-hub": FACTORY | {"dataset": "me/one,me/two", "val_size": 200, "eval_steps": 10},
    "trl": TRL,
    "trl-cpo": TRL | {"loss_type": "simpo", "simpo_gamma": 0.5, "load_in_4bit": True},
    "trl-dpo": TRL | {"loss_type": "sigmoid", "beta": 0.05, "use_peft": False, "eval_strategy": "no"},
    "trl-mixture": {name: value for name, value in TRL.items() if name != "dataset_name"}
    | {"datasets": [{"path": "me/a"}, {"path": "me/b"}]},
    "swift": SWIFT,
    "swift-lora": SWIFT | {"train_type": "lora", "rlhf_type": "dpo", "target_modules": "all-linear", "lora_rank": 4},
    "swift-cpo": SWIFT | {"rlhf_type": "cpo", "freeze_vit": False, "beta": 0.5},
    "axolotl": AXOLOTL,
    "axolotl-dpo": AXOLOTL | {"rl": "dpo", "adapter": "lora", "load_in_8bit": True, "val_set_size": 0},
    "axolotl-full": AXOLOTL | {"adapter": None, "deepspeed": "deepspeed_configs/zero2.json", "rl": "simpo"},
}


def converted(tmp_path: Path, theirs: Any, name: str = "theirs.yaml") -> tuple[Recipe, str]:
    source = tmp_path / name
    source.write_text(theirs if isinstance(theirs, str) else yaml.safe_dump(theirs))
    text = convert_config(source)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    return load_recipe(recipe), text


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_is_valid_and_every_field_is_carried_over_or_listed(tmp_path: Path, name: str) -> None:
    theirs = CASES[name]
    recipe, text = converted(tmp_path, theirs | {"a_field_of_tomorrow": 7})
    assert "#   a_field_of_tomorrow: 7, no counterpart" in text
    assert recipe.optim.learning_rate == float(theirs["learning_rate"])
    assert recipe.optim.epochs == float(theirs.get("num_train_epochs", theirs.get("num_epochs")))
    each = theirs.get("per_device_train_batch_size", theirs.get("micro_batch_size"))
    assert recipe.optim.pairs_per_step == each * theirs["gradient_accumulation_steps"]
    length = next(theirs[name] for name in ("cutoff_len", "max_length", "sequence_len") if name in theirs)
    assert recipe.data.max_length == length


def test_llamafactory(tmp_path: Path) -> None:
    recipe, text = converted(tmp_path, CASES["factory"])
    assert recipe.model.lora is not None
    assert (recipe.model.lora.r, recipe.model.lora.alpha, recipe.orpo.beta) == (8, 16, 0.2)
    assert (recipe.name, recipe.checkpoint.storage, recipe.checkpoint.every_steps) == ("orpo", "saves/qwen", 500)
    assert (recipe.optim.schedule, recipe.optim.warmup, recipe.model.dtype) == ("cosine", 0.1, "bfloat16")
    assert "a name in a dataset_info.json that is not here" in text
    (tmp_path / "data").mkdir()
    info = {"rlhf_v": {"hf_hub_url": "llamafactory/RLHF-V"}, "mine": {"file_name": "mine.json"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    recipe, text = converted(tmp_path, FACTORY | {"dataset": "rlhf_v, mine"})
    assert list(recipe.data.train) == ["hf://datasets/llamafactory/RLHF-V", str(tmp_path / "data" / "mine.json")]
    assert "dataset_info" not in text
    full, _ = converted(tmp_path, CASES["factory-full"])
    assert (full.model.freeze, full.deepspeed.zero_stage) == (["vision", "connector"], 3)
    named, _ = converted(tmp_path, CASES["factory-4bit"])
    assert named.model.lora is not None
    assert named.model.lora.target_modules == ["q_proj", "v_proj"]
    assert named.model.quantization is not None
    assert named.data.eval_fraction == 0.1
    _, text = converted(tmp_path, CASES["factory-8bit"])
    assert "in 4 bits or not quantized" in text
    assert "float16 is not used" in text


def test_trl_counts_the_prompt_and_dpo_becomes_orpo(tmp_path: Path) -> None:
    recipe, _ = converted(tmp_path, CASES["trl"])
    assert (recipe.orpo.nll, recipe.orpo.beta, recipe.optim.warmup) == ("prompt+response", 0.1, 150)
    assert list(recipe.data.train) == ["hf://datasets/trl-lib/rlaif-v"]
    assert list(recipe.data.eval) == ["hf://datasets/trl-lib/rlaif-v?split=test"]
    assert recipe.tracking.wandb.enabled is True
    dpo, text = converted(tmp_path, CASES["trl-dpo"])
    assert (dpo.objective.name, dpo.orpo.beta, dpo.model.lora) == ("orpo", 0.1, None)
    assert 'loss: "sigmoid", needs a reference model' in text
    assert "beta: 0.05, the beta of sigmoid has another meaning" in text
    assert not dpo.has_held_out
    assert "eval_steps: 500, there are no held-out pairs" in text
    simpo, _ = converted(tmp_path, CASES["trl-cpo"])
    assert simpo.objective_options == {"beta": 0.1, "gamma": 0.5, "label_smoothing": 0.0}


@pytest.mark.parametrize(
    "theirs",
    [{}, {"use_peft": True}, {"learning_rate": 2e-5, "gradient_accumulation_steps": 4, "warmup_steps": 9, "beta": 0.3}],
    ids=["full", "adapters", "given"],
)
def test_what_trl_reads_in_a_config_is_what_the_recipe_has(tmp_path: Path, theirs: dict[str, Any]) -> None:
    """With TRL's own parser, which also knows what a config leaves out."""
    from trl import ModelConfig, ScriptArguments, TrlParser
    from trl.experimental.orpo import ORPOConfig

    least = {"model_name_or_path": "me/model", "dataset_name": "me/pairs", "output_dir": str(tmp_path), "use_cpu": True}
    recipe, _ = converted(tmp_path, least | theirs)
    parser = TrlParser([ScriptArguments, ORPOConfig, ModelConfig])
    script, args, model = parser.parse_args_and_config(["--config", str(tmp_path / "theirs.yaml")])
    assert list(recipe.data.train) == [f"hf://datasets/{script.dataset_name}"]
    assert recipe.optim.pairs_per_step == args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert recipe.optim.epochs == args.num_train_epochs
    assert (recipe.optim.warmup, recipe.optim.schedule) == (args.warmup_steps, args.lr_scheduler_type)
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"):
        assert getattr(recipe.optim, name) == getattr(args, name), name
    assert (recipe.orpo.beta, recipe.data.max_length) == (args.beta, args.max_length)
    assert (recipe.model.id, recipe.model.lora is not None) == (model.model_name_or_path, model.use_peft)
    if recipe.model.lora is not None:
        found = recipe.model.lora
        assert (found.r, found.alpha, found.dropout) == (model.lora_r, model.lora_alpha, model.lora_dropout)


def test_what_others_leave_out_has_their_defaults(tmp_path: Path) -> None:
    model = {"model_name_or_path": "me/model", "dataset": "me/pairs"}
    factory, text = converted(tmp_path, model | {"stage": "dpo", "pref_loss": "orpo"})
    assert "What it leaves out has LLaMA-Factory's defaults." in text
    assert "lora_dropout" not in text
    found = factory.optim
    assert (found.learning_rate, found.epochs, found.pairs_per_step, found.warmup) == (5e-5, 3, 8, 0)
    assert (factory.data.max_length, factory.model.lora) == (2048, LoraConfig(r=8, alpha=16))
    swift = {"model": "me/model", "dataset": "me/pairs", "rlhf_type": "orpo"}
    found = converted(tmp_path, swift)[0].optim
    assert (found.learning_rate, found.schedule, found.weight_decay, found.adam_beta2) == (1e-4, "cosine", 0.1, 0.95)
    assert found.pairs_per_step == 16
    full, text = converted(tmp_path, swift | {"train_type": "full", "per_device_train_batch_size": 3, "max_steps": 9})
    assert (full.optim.learning_rate, full.optim.pairs_per_step) == (1e-5, 18)
    assert (full.optim.max_steps, full.optim.epochs) == (9, 10_000)  # epochs do not end the run before
    assert "max_length: null, there, the limit is the model's own" in text
    axolotl = {"base_model": "me/model", "rl": "orpo", "datasets": [{"path": "me/pairs"}], "learning_rate": 1e-5}
    found = converted(tmp_path, axolotl)[0].optim
    assert (found.epochs, found.pairs_per_step, found.schedule) == (1, 1, "cosine")
    simpo, _ = converted(tmp_path, model | {"stage": "dpo", "pref_loss": "simpo"})
    assert simpo.objective_options == {"beta": 0.1, "gamma": 0.5, "label_smoothing": 0.0}
    _, text = converted(tmp_path, model | {"stage": "dpo", "pref_loss": "sigmoid"})
    assert "beta:" not in text


def test_axolotl(tmp_path: Path) -> None:
    recipe, text = converted(tmp_path, CASES["axolotl"])
    assert recipe.model.quantization is not None
    assert recipe.model.lora is not None
    assert (recipe.model.lora.r, recipe.model.lora.target_modules, recipe.orpo.beta) == (32, [], 0.3)
    assert (recipe.optim.optimizer, recipe.model.gradient_checkpointing) == ("adamw_8bit", "auto")
    assert (recipe.name, recipe.tracking.wandb.project) == ("qlora-out", "mine")
    assert "special_tokens" in text


def test_a_shell_script_of_ms_swift(tmp_path: Path) -> None:
    words = {name: value for name, value in SWIFT.items() if name != "gradient_accumulation_steps"}
    arguments = " \\\n    ".join(f"--{name} {shlex.quote(str(value))}" for name, value in words.items())
    script = (
        "nproc_per_node=2\n\nCUDA_VISIBLE_DEVICES=0,1 \\\nNPROC_PER_NODE=$nproc_per_node \\\nswift rlhf \\\n    "
        f"{arguments} \\\n    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \\\n    --use_hf # a comment\n"
    )
    recipe, text = converted(tmp_path, script, "orpo.sh")
    assert (recipe.optim.pairs_per_step, recipe.scaling.num_workers) == (4 * 8 * 2, 2)
    assert (recipe.deepspeed.zero_stage, recipe.deepspeed.offload_optimizer) == (3, "cpu")
    assert list(recipe.data.train) == ["hf://datasets/swift/RLAIF-V"]
    assert "the number of rows after #" in text
    assert recipe.model.freeze == ["vision", "connector"]


def test_hostile_values_stay_in_comments(tmp_path: Path) -> None:
    theirs = FACTORY | {"evil\nname: hacked": "x\nmodel: {id: hacked}", "template": "a\n\nname: hacked"}
    recipe, text = converted(tmp_path, theirs)
    assert recipe.name == "orpo"
    assert all(line.startswith("#") for line in text.splitlines() if "hacked" in line)


@pytest.mark.parametrize("text", ["a: 1", "- 1", "x", "model_name_or_path: ''"])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        convert_config(path)


def test_plan_runs_on_a_converted_recipe(tmp_path: Path) -> None:
    source = tmp_path / "theirs.yaml"
    source.write_text(yaml.safe_dump(TRL | {"model_name_or_path": "orpo-ray/tiny-smolvlm"}))
    printed = orpo_ray_here("convert", str(source), cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "recipe.yaml").write_text(printed.stdout)
    planned = orpo_ray_here("plan", "recipe.yaml", "--json", "--pairs", "1000", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["gpus"]
