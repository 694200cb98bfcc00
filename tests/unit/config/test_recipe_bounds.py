"""Recipes that are made to break their reader: each gives one message within seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_ray.config.field_types import RESERVED_NAMES
from orpo_ray.config.load import load_recipe, parse_recipe
from orpo_ray.config.yaml_text import MAX_BYTES, MAX_VALUES, parse_yaml
from orpo_ray.data_report import check, prepare
from orpo_ray.errors import UserError, preview
from orpo_ray.exporting import export
from orpo_ray.storage import lease, run_folder

SECONDS = 10
BASE = "name: a\nmodel: {id: m}\ndata: {train: t.jsonl}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)
FILES = {
    "20,000 lists in one another": (BASE + "optim: " + "[" * 20_000 + "]" * 20_000, "nesting"),
    "20,000 mappings in one another": (BASE + "optim: " + "{a: " * 20_000, "20 levels of nesting"),
    "an alias bomb": (BOMB + "name: a\nmodel: {id: m}\ndata: {train: *a9}", f"more than {MAX_VALUES} values"),
    "an alias of itself": (BASE + "optim: &a {x: *a}", "stands for a part of itself"),
    "200,000 keys": (BASE + "optim: {" + ",".join(f"k{n}: 1" for n in range(90_000)) + "}", "more than"),
    "5,000 unknown keys": (BASE + "optim: {" + ",".join(f"k{n}: 1" for n in range(5_000)) + "}", "and 4980 more"),
    "an integer of 5,000 digits": (BASE + "optim: {max_steps: " + "9" * 5000 + "}", "this number is too large"),
    "20 MB of comments": (BASE + "# " + "x" * 20_000_000, f"larger than a recipe can be ({MAX_BYTES} bytes)"),
    "a tag": (BASE + "optim: {max_steps: !!int x}", "tags (tag:yaml.org,2002:int) are not supported"),
}
OVERRIDES = {
    "optim.epochs=1e308": "optim.epochs: Input should be a number of at most 1e+12 (found",
    "optim.epochs=20000": "less than or equal to 10000",
    "optim.max_steps=" + "9" * 5000: "optim.max_steps: not valid YAML for a recipe: this number is too large",
    "optim.max_steps=" + "9" * 4000: "optim.max_steps: Input should be a number of at most 1e+12",
    "optim.max_steps=true": "optim.max_steps: Input should be a valid number, not true or false (found True)",
    "optim.max_steps='1_0'": "optim.max_steps: Input should be a valid number (found '1_0')",
    "optim.max_steps=1_0": "optim.max_steps: Input should be a valid number (found '1_0')",
    "optim.max_steps=017": "optim.max_steps: Input should be a valid number (found '017')",
    "optim.max_steps=' 10 '": "optim.max_steps: Input should be a valid number (found ' 10 ')",
    "orpo.beta=true": "orpo.beta: Input should be a valid number, not true or false",
    "deepspeed.zero_stage=true": "deepspeed.zero_stage: Input should be a valid number, not true or false",
    "tune.search={orpo.beta: {choices: [.inf]}}": "tune.search.orpo.beta.choices.0: Input should be a finite number",
    "tune.search={orpo.beta: {low: '1_0', high: 20}}": "tune.search.orpo.beta.low: Input should be a valid number",
    "tune.search={orpo.beta: {choices: [" + "9" * 5000 + "]}}": "tune.search: not valid YAML",
    "data.train={a: true}": "data.train.a: Input should be a valid number",
    "optim=" + "[" * 20_000: "optim: not valid YAML",
    ".".join("a" * 20_000) + "=1": "no field has a name of so many parts",
    "name=" + "a" * 300: "name: must have at most 100 characters",
    "name=quickstart/final": "'final' in the folder of the run 'quickstart' belongs to that run",
    "name=quickstart/checkpoint_1": "'checkpoint_1' in the folder of the run 'quickstart' belongs to that run",
    "name=quickstart/trials": "'trials' in the folder of the run 'quickstart' belongs to that run",
    'data.train="a\\0b.jsonl"': r"must not contain the control character '\x00'",
    'data.train={"a\\0b": 0}': "data.train.a\ufffdb: ",
    'model.id="a\\0b"': r"model.id: must not contain the control character '\x00'",
    'checkpoint.storage="a\\0b"': r"checkpoint.storage: must not contain the control character '\x00'",
    "model.id=" + "m" * 300: "model.id: no file can have a name of 300 bytes",
    "data.train=" + "a/" * 2000: "must have at most 2048 bytes",
    "orpo.nll=" + "x" * 100_000: "orpo.nll: Input should be 'response' or 'prompt+response' (found 'xxx",
}


def message(path: Path, *overrides: str) -> str:
    started = time.thread_time()
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    assert time.thread_time() - started < SECONDS
    assert len(str(error.value)) < 5000
    return str(error.value)


@pytest.mark.parametrize("fault", FILES)
def test_a_hostile_file_is_one_message(tmp_path: Path, fault: str) -> None:
    text, expected = FILES[fault]
    (tmp_path / "recipe.yaml").write_text(text)
    found = message(tmp_path / "recipe.yaml")
    assert "recipe.yaml" in found
    assert expected in found


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: override[:40])
def test_a_hostile_value_is_one_message(tmp_path: Path, override: str) -> None:
    (tmp_path / "recipe.yaml").write_text(BASE)
    assert OVERRIDES[override] in message(tmp_path / "recipe.yaml", override)


def test_files_that_never_end_or_cannot_be_opened(tmp_path: Path) -> None:
    assert "larger than a recipe can be" in message(Path("/dev/zero"))
    assert "cannot read the recipe" in message(tmp_path / ("a" * 300))
    assert "cannot read the recipe" in message(Path("a\0b"))
    assert "cannot read the recipe" in message(tmp_path)


def test_numbers_can_be_written_as_usual(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(BASE + "optim: {learning_rate: 1e-4, weight_decay: '0.1', epochs: 2}")
    overrides = [
        "orpo.beta=1",
        "optim.warmup=1e-2",
        "optim.max_steps=1e3",
        "tune.search={orpo.beta: {choices: [1e-1]}}",
    ]
    recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
    assert (recipe.optim.learning_rate, recipe.optim.weight_decay, recipe.optim.epochs) == (1e-4, 0.1, 2.0)
    assert (recipe.orpo.beta, recipe.optim.warmup, recipe.optim.max_steps) == (1.0, 0.01, 1000)
    assert recipe.tune.search["orpo.beta"].choices == [0.1]


@pytest.mark.parametrize("revision", ["12e4567", "0123456", "1_0", "2026-01-31", "1:30", "1.5e3", "-.5", "yes", "0x1f"])
def test_text_that_looks_like_a_number_survives_a_run_folder(revision: str) -> None:
    raw: dict[str, Any] = {"name": "a", "model": {"id": "m", "revision": revision}, "data": {"train": "t.jsonl"}}
    recipe = parse_recipe(raw)
    assert parse_recipe(parse_yaml(recipe.to_yaml(), "recipe")) == recipe


def test_a_commit_needs_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(BASE)
    for commit in ("12e4567", "0123456"):
        assert load_recipe(tmp_path / "recipe.yaml", [f"model.revision={commit}"]).model.revision == commit


def test_what_a_run_writes_to_its_folder_is_reserved() -> None:
    files = (run_folder.RECIPE_FILE, run_folder.METRICS_FILE, run_folder.BAD_ROWS_FILE, run_folder.FINAL)
    files += (
        run_folder.BEST_RECIPE_FILE,
        run_folder.TRIALS,
        run_folder.DATA_CHECK_FILE,
        run_folder.DATA_FILE,
        run_folder.EVAL_PAIRS_FILE,
        run_folder.EVAL_PAIRS_START_FILE,
        run_folder.ENVIRONMENT_FILE,
        run_folder.REPORT_FILE,
        run_folder.EVAL_TOKENS_FILE,
        run_folder.GENERATIONS_FILE,
        run_folder.SWEEP_FILE,
        run_folder.SWEEP_PAGE,
        run_folder.TRIALS_TABLE,
        run_folder.OPTUNA_FILE,
        run_folder.ROUNDS_FILE,
        lease.LEASE_FILE,
    )
    assert {
        *files,
        check.PAGE_FILE,
        prepare.PREPARED,
        export.EXPORT,
        f"{export.EXPORT}-adapter",
        "wandb",
        "tensorboard",
    } == set(RESERVED_NAMES)
    for name in ("final", "a/b", "a/trials/abc_00000"):
        assert parse_recipe({"name": name, "model": {"id": "m"}, "data": {"train": "t"}}).name == name


def test_a_home_folder_of_nobody_is_an_ordinary_path() -> None:
    raw = yaml.safe_load(BASE) | {"data": {"train": "~no-such-user/a.jsonl"}}
    assert list(parse_recipe(raw).with_absolute_paths().data.train) == [f"{Path.cwd()}/~no-such-user/a.jsonl"]


def test_a_long_list_of_sources_is_counted_once() -> None:
    started = time.thread_time()
    recipe = parse_recipe(yaml.safe_load(BASE) | {"data": {"train": [f"{n}.jsonl" for n in range(50_000)]}})
    assert len(recipe.data.train) == 50_000
    assert time.thread_time() - started < SECONDS


def test_values_that_python_cannot_show() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert preview(10**5000) == "int, too large to show"
    assert preview(deep) == "list, too large to show"
    assert preview("x" * 100) == "'" + "x" * 76 + "..."
