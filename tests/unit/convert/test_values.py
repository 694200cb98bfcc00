"""Values that a recipe cannot take over: each is listed under its own name, none ends in a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_ray.config.load import load_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.convert.convert import convert_config
from orpo_ray.convert.draft import as_number
from orpo_ray.errors import UserError

FACTORY = {"model_name_or_path": "me/model", "stage": "dpo", "pref_loss": "orpo", "dataset": "me/pairs"}
TRL = {"model_name_or_path": "me/model", "dataset_name": "me/pairs"}
SWIFT = {"model": "me/model", "rlhf_type": "orpo", "dataset": "me/pairs"}
AXOLOTL = {"base_model": "me/model", "rl": "orpo", "datasets": [{"path": "me/pairs"}], "learning_rate": 1e-5}


def converted(folder: Path, theirs: dict[str, Any]) -> tuple[Recipe, str]:
    source, recipe = folder / "theirs.yaml", folder / "recipe.yaml"
    source.write_text(yaml.safe_dump(theirs))
    recipe.write_text(text := convert_config(source))
    return load_recipe(recipe), text


@pytest.mark.parametrize(
    ("theirs", "note"),
    [
        (FACTORY | {"pref_beta": "high"}, 'pref_beta: "high", not understood; it would be orpo.beta'),
        (FACTORY | {"lora_rank": "eight"}, 'lora_rank: "eight", not understood; it would be model.lora.r'),
        (FACTORY | {"lora_target": [["q_proj"]]}, 'lora_target: [["q_proj"]], not understood'),
        (FACTORY | {"lora_rank": [8]}, "lora_rank: [8], not understood"),
        (FACTORY | {"val_size": "some"}, 'val_size: "some", not understood; it would be data.eval_fraction'),
        (FACTORY | {"save_steps": "often"}, 'save_steps: "often", not understood; it would be checkpoint.every_steps'),
        (FACTORY | {"warmup_ratio": "x"}, 'warmup_ratio: "x", not understood; it would be optim.warmup'),
        (FACTORY | {"warmup_steps": {"a": 1}}, 'warmup_steps: {"a": 1}, not understood; it would be optim.warmup'),
        (FACTORY | {"pref_loss": "simpo", "simpo_gamma": "x"}, 'simpo_gamma: "x", not understood'),
        (FACTORY | {"quantization_bit": "auto"}, 'quantization_bit: "auto", weights are in 4 bits or not quantized'),
        (FACTORY | {"quantization_bit": 3}, "quantization_bit: 3, weights are in 4 bits or not quantized"),
        (FACTORY | {"seed": 1.5}, "seed: 1.5, not understood; it would be optim.seed"),
        (FACTORY | {"learning_rate": float("inf")}, "learning_rate: Infinity, not understood"),
        (FACTORY | {"dataset": 3}, "dataset: 3, not understood"),
        (TRL | {"max_steps": "many"}, 'max_steps: "many", not understood; it would be optim.max_steps'),
        (TRL | {"model_revision": ["a"]}, 'model_revision: ["a"], not understood; it would be model.revision'),
        (SWIFT | {"split_dataset_ratio": "x"}, 'split_dataset_ratio: "x", not understood'),
        (SWIFT | {"per_device_train_batch_size": "\u00b2"}, "per_device_train_batch_size:"),
        (SWIFT | {"dataset": [{"a": 1}, None]}, 'dataset: {"a": 1}, not understood'),
        (AXOLOTL | {"val_set_size": "some"}, 'val_set_size: "some", not understood'),
        (AXOLOTL | {"datasets": 3}, "datasets: 3, not understood; it would be a source in data.train"),
        (AXOLOTL | {"datasets": {"type": "x"}}, 'datasets: {"type": "x"}, not understood'),
    ],
)
def test_a_value_of_another_kind_is_listed(tmp_path: Path, theirs: dict[str, Any], note: str) -> None:
    _, text = converted(tmp_path, theirs)
    assert f"#   {note}" in text


def test_numbers() -> None:
    assert [as_number(value, int) for value in (4, "4", 4.0, "1e3")] == [4, 4, 4, 1000]
    assert as_number("1e-5", float) == 1e-5
    for value in (True, None, "nan", "1" * 5000, 10**400, [1], "", "4.5"):
        with pytest.raises(ValueError, match=r"number|float"):
            as_number(value, int)


@pytest.mark.parametrize(
    "given", ["me/pairs", ["me/pairs"], {"path": "me/pairs"}, [{"path": "me/pairs"}, None, {"type": "x"}, {"path": ""}]]
)
@pytest.mark.parametrize("theirs", [AXOLOTL, TRL], ids=["axolotl", "trl"])
def test_datasets_in_every_form(tmp_path: Path, theirs: dict[str, Any], given: Any) -> None:
    recipe, text = converted(tmp_path, {k: v for k, v in theirs.items() if k != "dataset_name"} | {"datasets": given})
    assert list(recipe.data.train) == ["hf://datasets/me/pairs"]
    listed = [line for line in text.splitlines() if line.startswith("#   datasets: ")]
    assert len(listed) == (3 if isinstance(given, list) and len(given) > 1 else 0)


def test_splits_and_configurations_of_a_mixture(tmp_path: Path) -> None:
    mixture = [
        {"path": "me/a", "split": "train[:10%]"},
        {"path": "me/b", "name": "french"},
        {"path": "me/c", "split": "extra"},
        {"path": "rows.jsonl", "split": "extra"},
    ]
    recipe, text = converted(tmp_path, {"model_name_or_path": "me/model", "datasets": mixture})
    sources = ["hf://datasets/me/a", "hf://datasets/me/b", "hf://datasets/me/c?split=extra", "rows.jsonl"]
    assert list(recipe.data.train) == sources
    assert 'datasets: {"path": "me/a", "split": "train[:10%]"}, a part of a split' in text
    assert 'datasets: {"path": "me/b", "name": "french"}, name the files of the configuration' in text
    assert 'datasets: {"path": "rows.jsonl", "split": "extra"}, name the files of the split' in text
    assert "me/c" not in text.partition("\nname:")[0]


def test_a_configuration_of_held_out_pairs_is_named_with_its_field(tmp_path: Path) -> None:
    _, text = converted(tmp_path, AXOLOTL | {"test_datasets": [{"path": "me/b", "name": "french"}]})
    assert 'test_datasets: {"path": "me/b", "name": "french"}, name the files of the configuration in data.eval' in text


def test_an_evaluation_split(tmp_path: Path) -> None:
    evaluated = TRL | {"eval_strategy": "steps", "dataset_test_split": "test[:5%]"}
    recipe, text = converted(tmp_path, evaluated)
    assert list(recipe.data.eval or ()) == ["hf://datasets/me/pairs?split=test"]
    assert '"split": "test[:5%]"}, a part of a split' in text
    recipe, text = converted(tmp_path, evaluated | {"dataset_name": "rows.jsonl", "dataset_test_split": "test"})
    assert not recipe.data.eval  # not the training rows
    assert '"split": "test"}, name the files of the split in data.eval' in text


def test_options_without_a_value_and_names_that_end_a_comment(tmp_path: Path) -> None:
    recipe, text = converted(tmp_path, TRL | {"output_dir": True, "odd\u2028name: evil": 1})
    assert recipe.name == "trl"
    assert "output_dir: true, not understood" in text
    assert "odd name" in text
    _, text = converted(tmp_path, FACTORY | {"lora_target": 3})
    assert "lora_target: 3, not understood" in text


def test_subsets_of_swift(tmp_path: Path) -> None:
    given = ["me/pairs:sub#500", "HF::me/more", "s3://b/x.jsonl", "local.jsonl#7"]
    recipe, text = converted(tmp_path, SWIFT | {"dataset": given})
    assert list(recipe.data.train) == [
        "hf://datasets/me/pairs", "hf://datasets/me/more", "s3://b/x.jsonl", "local.jsonl",
    ]  # fmt: skip
    assert 'dataset: "me/pairs:sub#500", the subset after : is not carried over' in text
    assert text.count("the number of rows after #") == 2


def test_batch_sizes_that_are_no_counts(tmp_path: Path) -> None:
    _, text = converted(tmp_path, AXOLOTL | {"micro_batch_size": 0, "gradient_accumulation_steps": "auto"})
    assert "micro_batch_size: 0, not a number of 1 or more; set optim.pairs_per_step" in text
    assert 'gradient_accumulation_steps: "auto", not a number of 1 or more' in text
    recipe, text = converted(tmp_path, AXOLOTL | {"micro_batch_size": 2})
    assert recipe.optim.pairs_per_step == 2
    assert "micro_batch_size: 2, pairs_per_step is 2 for one GPU; multiply it by your number of GPUs" in text


def test_frozen_parts_with_lora(tmp_path: Path) -> None:
    recipe, text = converted(tmp_path, SWIFT | {"freeze_vit": True, "freeze_aligner": False})
    assert "freeze_vit: true, LoRA freezes the base weights anyway, and the vision part gets no adapter" in text
    assert "freeze_aligner: false, adapters are in the language model; add connector to model.lora.target" in text
    assert recipe.model.freeze == []
    recipe, text = converted(tmp_path, SWIFT | {"freeze_vit": True, "target_modules": ["q_proj"]})
    assert recipe.model.freeze == ["vision"]  # q_proj would match its layers
    recipe, text = converted(tmp_path, FACTORY | {"lora_target": "q_proj", "freeze_vision_tower": False})
    assert recipe.model.freeze == ["connector"]
    assert "freeze" not in text.partition("\nname:")[0]


def test_a_recipe_that_is_not_valid_names_their_fields(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        converted(tmp_path, TRL | {"beta": -1, "num_train_epochs": 0})
    assert "correct beta (orpo.beta), num_train_epochs (optim.epochs) in theirs.yaml" in str(caught.value)
