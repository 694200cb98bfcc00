"""Recipes: which ones are accepted, and the error messages for all others."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_ray.config.load import apply_overrides, load_recipe, parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.config.rules import DECIDED_BY, RULES, Rule
from orpo_ray.errors import RowError, UserError
from support.paths import ROOT

MINIMAL: dict[str, Any] = {"name": "a", "model": {"id": "m"}, "data": {"train": "t.jsonl"}}


def message(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        parse_recipe(raw)
    return str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_state_their_requirements(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    comment = path.read_text().split("\nname:")[0].lower()
    assert all(word in comment for word in ("hardware", "memory", "data")), "a recipe says hardware, memory and data"


def test_defaults_are_trls() -> None:
    recipe = parse_recipe(MINIMAL)
    assert (recipe.orpo.beta, recipe.optim.learning_rate, recipe.data.max_length) == (0.1, 1e-6, 1024)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"orpo": {"betta": 0.1}}, "orpo.betta: unknown field; did you mean 'beta'?"),
        ({"modle": {}}, "modle: unknown field; did you mean 'model'?"),
        ({"model": {"id": "m", "lora": {"rank": 4}}}, "model.lora.rank: unknown field"),
        ({"orpo": {"zzz": 1}}, "fields here: beta, nll"),
        ({"beta": 0.1}, "beta: unknown field; fields here: name, model"),
        ({"orpo": {"beta": -1}}, "orpo.beta: Input should be greater than or equal to 0 (found -1)"),
        ({"orpo": {"nll": "all"}}, "'response' or 'prompt+response' (found 'all')"),
        ({"optim": {"learning_rate": "fast"}}, "optim.learning_rate: Input should be a valid number"),
        ({"optim": {"pairs_per_step": 1.5}}, "optim.pairs_per_step"),
        ({"deepspeed": {"zero_stage": 4}}, "deepspeed.zero_stage"),
        ({"data": {}}, "data.train: this field is required"),
        ({"data": {"train": None}}, "data.train: give at least one source"),
        ({"scaling": {"num_workers": 64}}, "scaling.num_workers (64) exceeds optim.pairs_per_step (32)"),
        (
            {"scaling": {"num_workers": 6, "sequence_parallel": 4}},
            "scaling.num_workers (6) is no multiple of scaling.sequence_parallel (4)",
        ),
        (
            {"scaling": {"num_workers": [2, 5], "sequence_parallel": 2}},
            "scaling.num_workers (5) is no multiple of scaling.sequence_parallel (2)",
        ),
        (
            {"scaling": {"num_workers": [1, 4], "sequence_parallel": 2}},
            "scaling.num_workers (1) is no multiple of scaling.sequence_parallel (2)",
        ),
        (
            {"scaling": {"num_workers": 2, "sequence_parallel": 2}, "model": {"id": "m", "attention": "concatenated"}},
            "scaling.sequence_parallel (2) divides the row of a shared prefix, and model.attention is concatenated",
        ),
        ({"scaling": {"num_workers": [1, 64]}}, "scaling.num_workers (64) exceeds optim.pairs_per_step (32)"),
        ({"scaling": {"num_workers": [4, 2]}}, "scaling.num_workers: must be [min, max], and the first is greater"),
        ({"scaling": {"num_workers": [1, 2, 3]}}, "scaling.num_workers: must be a number or [min, max]"),
        (
            {"scaling": {"num_workers": 0}},
            "scaling.num_workers: Input should be a whole number of at least 1 (found 0)",
        ),
        ({"scaling": {"num_workers": [1.5, 2]}}, "Input should be a whole number of at least 1"),
        ({"model": {"id": "m", "freeze": ["vision", "connector", "language"]}}, "nothing would be trained"),
        ({"eval": {"every_steps": 5}}, "eval.every_steps is set but there are no held-out pairs"),
        ({"eval": {"generate": 5}}, "eval.generate is set but there are no held-out pairs"),
        (
            {"eval": {"generate": 5}, "data": {"train": "x", "eval_fraction": 0.1}, "deepspeed": {"zero_stage": 3}},
            "eval.generate needs whole weights on each worker",
        ),
        ({"name": "../up"}, "must consist of letters"),
        ({"data": {"train": "a", "format": "sharegtp"}}, "unknown format; did you mean 'sharegpt'?"),
        (
            {"data": {"train": "a", "eval": "b", "eval_fraction": 0.1}},
            "data.eval and data.eval_fraction are both set; set data.eval_fraction=0 or data.eval={}",
        ),
        ({"checkpoint": {"storage": "ftp://bucket"}}, "must be a folder"),
        ({"tune": {"search": {"orpo.beta": {"low": 2, "high": 1}}}}, "low (2.0) must be below high (1.0)"),
        ({"optim": {"learning_rate": float("nan")}}, "finite number"),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(change: dict[str, Any], expected: str) -> None:
    assert expected in message(MINIMAL | change)


def test_the_number_of_workers_may_be_a_range() -> None:
    found = parse_recipe(MINIMAL | {"scaling": {"num_workers": ["1", 4]}})
    assert parse_recipe(yaml.safe_load(found.to_yaml())) == found
    assert (found.scaling.min_workers, found.scaling.max_workers) == (1, 4)
    assert parse_recipe(MINIMAL | {"scaling": {"num_workers": [2, 2]}}).scaling.num_workers == 2


def test_all_problems_are_reported_at_once() -> None:
    text = message(MINIMAL | {"orpo": {"beta": -1, "bta": 2}, "optim": {"epochs": 0}})
    assert "3 problems" in text
    assert all(field in text for field in ("orpo.beta", "orpo.bta", "optim.epochs"))


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_overrides_are_yaml_and_reach_any_depth(recipe_file: Path) -> None:
    overrides = ["optim.learning_rate=5e-6", "model.lora.r=4", "data.train=[a.jsonl, b.jsonl]", "name=b"]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.optim.learning_rate == 5e-6
    assert recipe.model.lora is not None
    assert recipe.model.lora.r == 4
    assert recipe.data.train == {"a.jsonl": 1.0, "b.jsonl": 1.0}
    assert recipe.name == "b"


@pytest.mark.parametrize("override", ["optim.learning_rate", "=3", "name.sub=1", "orpo.beta=[1"])
def test_malformed_overrides(recipe_file: Path, override: str) -> None:
    with pytest.raises(UserError):
        load_recipe(recipe_file, [override])


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\x00", ""])
def test_file_that_is_no_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_recipe(path)


def test_sources_are_a_uri_a_list_or_a_weighted_mapping() -> None:
    def train(value: object) -> dict[str, float]:
        return parse_recipe(MINIMAL | {"data": {"train": value}}).data.train

    assert train("a.jsonl") == {"a.jsonl": 1.0}
    assert train(["a.jsonl", "b.jsonl", "a.jsonl"]) == {"a.jsonl": 2.0, "b.jsonl": 1.0}
    twice = parse_recipe(MINIMAL | {"data": {"train": ["a.jsonl", "./a.jsonl", ""]}}).with_absolute_paths().data.train
    assert twice == {f"{Path.cwd()}/a.jsonl": 2.0, "": 1.0}
    assert train({"s3://bucket/a": 2, "b.jsonl": 0.5}) == {"s3://bucket/a": 2.0, "b.jsonl": 0.5}
    with pytest.raises(UserError, match="greater than 0"):
        train({"a.jsonl": 0})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_every_field_is_documented() -> None:
    def undocumented(schema: dict[str, Any]) -> list[str]:
        sections = {"Recipe": schema, **schema["$defs"]}
        own = [
            f"{title}.{name}"
            for title, section in sections.items()
            for name, field in section.get("properties", {}).items()
            if "description" not in field and "$ref" not in field
        ]
        return own

    assert undocumented(Recipe.model_json_schema()) == []


@pytest.mark.parametrize(
    "error", [UserError("bad", field="a.b", value=3, fix="do"), UserError("bad"), RowError("reason", "detail")]
)
def test_errors_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_absolute_paths_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vlm").mkdir()
    data = {"train": ["easy-vqa:train", "a/*.jsonl"], "eval": "b.parquet", "image_root": "images"}
    with_absolute_paths = parse_recipe({"name": "a", "model": {"id": "./vlm"}, "data": data}).with_absolute_paths()
    assert with_absolute_paths.data.train == {"easy-vqa:train": 1.0, f"{tmp_path}/a/*.jsonl": 1.0}
    assert with_absolute_paths.data.eval == {f"{tmp_path}/b.parquet": 1.0}
    assert with_absolute_paths.data.image_root == str(tmp_path / "images")
    assert with_absolute_paths.model.id == str(tmp_path / "vlm")
    assert with_absolute_paths.run_uri == str(tmp_path / "runs" / "a")
    assert with_absolute_paths.with_absolute_paths() == with_absolute_paths
    assert parse_recipe(MINIMAL | {"model": {"id": "org/name"}}).with_absolute_paths().model.id == "org/name"


def test_runs_of_a_ray_job_are_not_stored_in_its_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert parse_recipe(MINIMAL).with_absolute_paths().run_uri == str(Path.home() / "runs" / "a")
    assert parse_recipe(MINIMAL | {"checkpoint": {"storage": "/shared"}}).run_uri == "/shared/a"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "vision_cache with a trained vision encoder or connector": (
        {"model": {"vision_cache": "seen", "freeze": ["vision"]}},
        "freeze: [vision, connector]",
    ),
    "vision_cache with ZeRO-3": (
        {"model": {"vision_cache": "seen", "lora": {}}, "deepspeed": {"zero_stage": 3}},
        "zero_stage: 2",
    ),
    "quantization without LoRA": ({"model": {"quantization": {}}}, "add model.lora"),
    "a quant_storage other than the model's dtype": (
        {"model": {"lora": {}, "dtype": "bfloat16", "quantization": {"quant_storage": "float32"}}},
        "quant_storage: uint8",
    ),
    "the quantized language model in modules_to_save": (
        {"model": {"lora": {"target_modules": "vision", "modules_to_save": "language"}, "quantization": {}}},
        "target_modules: [language]",
    ),
    "DoRA on 4-bit weights with ZeRO-3": (
        {"model": {"lora": {"use_dora": True}, "quantization": {}}, "deepspeed": {"zero_stage": 3}},
        "zero_stage: 2, or use_dora: false",
    ),
    "adapters on a frozen part": ({"model": {"lora": {}, "freeze": "language"}}, "remove the part from model.freeze"),
    "a frozen part in modules_to_save": (
        {"model": {"lora": {"modules_to_save": "connector"}, "freeze": ["vision", "connector"]}},
        "remove the part from one of the two lists",
    ),
    "the same modules in target_modules and modules_to_save": (
        {"model": {"lora": {"target_modules": ["q_proj", "connector"], "modules_to_save": "connector"}}},
        "remove the modules from one of the two lists",
    ),
    "an offloaded optimizer without sharding": (
        {"model": {}, "deepspeed": {"offload_optimizer": "cpu"}},
        "zero_stage: 1 to 3",
    ),
    "an offloaded optimizer with 8-bit states": (
        {
            "model": {},
            "deepspeed": {"offload_optimizer": "cpu", "zero_stage": 2},
            "optim": {"optimizer": "adamw_8bit"},
        },
        "optim.optimizer: adamw",
    ),
    "offloaded weights without ZeRO-3": (
        {"model": {}, "deepspeed": {"offload_param": "cpu", "zero_stage": 2}},
        "zero_stage: 3",
    ),
    "vision_cache with other images that differ in every epoch": (
        {
            "model": {"vision_cache": "c", "freeze": ["vision", "connector"]},
            "orpo": {"image_beta": 0.1, "other_image": "noise"},
        },
        "orpo.other_image: exchange",
    ),
    "settings of DeepSpeed in a run without it": (
        {"model": {}, "deepspeed": {"config": {"steps_per_print": 10}}},
        "zero_stage: 1 to 3",
    ),
    "settings that the recipe decides": (
        {"model": {}, "deepspeed": {"zero_stage": 2, "config": {"gradient_clipping": 2.0}}},
        "set the fields of the recipe",
    ),
    "a setting that is not a mapping": (
        {"model": {}, "deepspeed": {"zero_stage": 2, "config": {"zero_optimization": 3}}},
        "zero_optimization: {name: value}",
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.combination)
def test_conflicting_options_are_refused_with_an_alternative(rule: Rule) -> None:
    change, alternative = REFUSED[rule.combination]
    raw = MINIMAL | change | {"model": {"id": "m"} | change["model"]}
    text = message(raw)
    assert f"recipe: {rule.field}: {rule.combination} (" in text
    assert rule.reason in text
    assert f"\n    fix: {alternative}" in text
    assert rule.find(parse_recipe(MINIMAL)) == []


@pytest.mark.parametrize("key", DECIDED_BY)
def test_deepspeed_config_cannot_contradict_the_recipe(key: str) -> None:
    """The message names the setting, its value, and the field of the recipe."""
    section, _, name = key.rpartition(".")
    config = {section: {name: 7}} if section else {name: 7}
    text = message(MINIMAL | {"deepspeed": {"zero_stage": 3, "config": config}})
    assert f"deepspeed.config: settings that the recipe decides ({key}: 7, see {DECIDED_BY[key]})" in text
    section, _, name = DECIDED_BY[key].partition(".")
    assert name in type(getattr(parse_recipe(MINIMAL), section)).model_fields


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"id": "m", "lora": {}, "freeze": ["vision", "connector"], "quantization": {}}},
        {"model": {"id": "m", "lora": {"modules_to_save": "connector"}, "quantization": {}, "freeze": "vision"}},
        {"model": {"id": "m", "lora": {"use_dora": True}, "quantization": {}}, "deepspeed": {"zero_stage": 2}},
        {"model": {"id": "m", "lora": {}, "quantization": {}}, "deepspeed": {"zero_stage": 3}},
        {"model": {"id": "m", "lora": {"target_modules": "vision"}, "freeze": "language"}},
    ],
)
def test_compatible_options_are_accepted(change: dict[str, Any]) -> None:
    assert parse_recipe(MINIMAL | change)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("optim.lr", "learning_rate"), ("optim.num_train_epochs", "epochs"), ("optim.batch_size", "pairs_per_step"),
        ("data.max_seq_length", "max_length"), ("model.model_name_or_path", "id"), ("checkpoint.output_dir", "storage"),
        ("checkpoint.save_steps", "every_steps"), ("scaling.num_gpus", "num_workers"),
    ],
)  # fmt: skip
def test_names_of_other_trainers_lead_to_ours(theirs: str, ours: str) -> None:
    raw = {"name": "x", "model": {"id": "a/b"}, "data": {"train": "x.jsonl"}}
    apply_overrides(raw, [f"{theirs}=1"])
    with pytest.raises(UserError, match=f"unknown field; did you mean '{ours}'"):
        parse_recipe(raw)


def test_other_images_are_read_only_with_an_image_preference() -> None:
    crop = {"other_image": "crop"}
    assert parse_recipe(MINIMAL | {"orpo": crop}).other_image is None
    assert parse_recipe(MINIMAL | {"orpo": crop | {"image_beta": 0.1}}).other_image == "crop"
    assert parse_recipe(MINIMAL | {"objective": "simpo"}).other_image is None
