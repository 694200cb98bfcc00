"""Files that a run writes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.generations import Generation, lines_by_pair
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.tracking.metrics_file import last_metrics
from orpo_ray.tracking.trackers import MultiLogger
from support.tiny_runs import tiny_recipe
from support.wandb_files import wandb_records


def test_metrics_after_the_resumed_step_are_taken_back(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    first = MultiLogger.open(recipe, step=0, warn=pytest.fail)
    for step in range(1, 6):
        first.log(step, {"train/loss": float(step)})
    first.close()
    with (Path(recipe.run_uri) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/l')  # incomplete, since the process was killed
    second = MultiLogger.open(recipe, step=3, warn=pytest.fail)
    second.log(4, {"train/loss": 40.0})
    second.close()
    path = Path(recipe.run_uri) / "metrics.jsonl"
    restart = {"step": 3, "train/restarts": 1, "train/repeated_steps": 2}
    assert read_jsonl(path)[3:] == [restart, {"step": 4, "train/loss": 40.0}]
    assert [line["step"] for line in read_jsonl(path) if "train/loss" in line] == [1, 2, 3, 4]
    MultiLogger.open(recipe, step=3, warn=pytest.fail).close()  # one that makes no step is counted too
    third = MultiLogger.open(recipe, step=2, warn=pytest.fail)
    third.log(3, {"train/loss": 30.0})
    third.close()
    expected = {"step": 3, "train/loss": 30.0, "train/restarts": 3, "train/repeated_steps": 4}
    assert last_metrics(RunFolder(recipe.run_uri)) == expected


def test_small_numbers_keep_their_digits(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    logger = MultiLogger.open(recipe, step=0, warn=pytest.fail)
    logger.log(1, {"train/learning_rate": 1.23456789e-9, "train/tokens": 12345678901234})
    logger.close()
    (line,) = read_jsonl(Path(recipe.run_uri) / "metrics.jsonl")
    assert line == {"step": 1, "train/learning_rate": 1.23456789e-9, "train/tokens": 12345678901234}


def test_a_line_cut_off_by_a_kill_does_not_spoil_the_next(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    Path(recipe.run_uri).mkdir()
    row = BadRow(0, "1", "a:1", "too_long", "x")
    (Path(recipe.run_uri) / "bad_rows.jsonl").write_text(json.dumps(row.as_line()) + '\n{"id": "2", "sou')
    (Path(recipe.run_uri) / "metrics.jsonl").write_text('{"step": 1, "tr')
    for source in ("a:2", "a:3"):
        tracker = MultiLogger.open(recipe, step=1, warn=pytest.fail)
        tracker.log_bad_rows([replace(row, source=source)])
        tracker.close()
    assert [line["source"] for line in read_jsonl(Path(recipe.run_uri) / "bad_rows.jsonl")] == ["a:1", "a:2", "a:3"]
    assert [line["train/restarts"] for line in read_jsonl(Path(recipe.run_uri) / "metrics.jsonl")] == [1, 2]


def test_a_bad_row_is_written_once(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    row = BadRow(0, "é", "a:1", "too_long", "x")
    for step in (0, 1):
        tracker = MultiLogger.open(recipe, step, warn=pytest.fail)
        tracker.log_bad_rows([row, row])
        tracker.close()
    assert read_jsonl(Path(recipe.run_uri) / "bad_rows.jsonl") == [
        {"id": "é", "source": "a:1", "reason": "too_long", "detail": "x"}
    ]


def test_a_new_run_forgets_what_a_check_wrote(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    Path(recipe.run_uri).mkdir()
    old_row = BadRow(0, "1", "a:1", "too_long", "x")
    (Path(recipe.run_uri) / "bad_rows.jsonl").write_text(json.dumps(old_row.as_line()) + "\n")
    tracker = MultiLogger.open(recipe, step=0, warn=pytest.fail)
    tracker.log_bad_rows([replace(old_row, source="a:2")])
    tracker.close()
    assert [line["source"] for line in read_jsonl(Path(recipe.run_uri) / "bad_rows.jsonl")] == ["a:2"]


def test_wandb_offline_keeps_the_key_out_of_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    recipe = tiny_recipe(tmp_path, "run", tracking={"wandb": {"enabled": True, "mode": "offline"}})
    tracker = MultiLogger.open(recipe, step=0, warn=pytest.fail)
    tracker.log(1, {"train/loss": 1.0, "eval/rewards/margins": 0.5})
    tracker.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_runs_in_one_process_have_a_wandb_run_each(tmp_path: Path) -> None:
    """As trials that share a process do: when one ends, the other goes on."""
    wandb = {"enabled": True, "mode": "offline"}
    recipes = [tiny_recipe(tmp_path, name, tracking={"wandb": wandb}) for name in ("one", "two")]
    first, second = (MultiLogger.open(recipe, step=0, warn=pytest.fail) for recipe in recipes)
    first.log(1, {"train/loss": 1.0})
    second.log(1, {"train/loss": 2.0})
    first.close()
    second.log(2, {"train/loss": 3.0})
    second.close()
    for recipe, expected in zip(recipes, ([1.0], [2.0, 3.0]), strict=True):
        (file,) = Path(recipe.run_uri).rglob("*.wandb")
        items = [item for record in wandb_records(file) for item in record.history.item]
        losses = [item.value_json for item in items if "train/loss" in (item.key, *item.nested_key)]
        assert list(map(json.loads, losses)) == expected


def test_generations_of_steps_that_are_repeated_are_replaced(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run", data={"eval": "easy-vqa:test"}, eval={"generate": 2})
    answer = Generation(0, "7", "digest", "Was ist das?", "ä", "b", greedy="c", sampled="d", images=(b"jpeg",))
    first = MultiLogger.open(recipe, step=0, warn=pytest.fail)
    for step in (0, 5, 10):
        first.log_generations(step, [answer, replace(answer, sample_index=3)])
    first.close()
    second = MultiLogger.open(recipe, step=5, warn=pytest.fail)
    second.log_generations(10, [replace(answer, greedy="later")])
    second.close()
    found = lines_by_pair(read_jsonl(Path(recipe.run_uri) / "generations.jsonl"))
    assert {index: list(lines) for index, lines in found.items()} == {0: [0, 5, 10], 3: [0, 5]}
    assert (found[0][5]["greedy"], found[0][10]["greedy"]) == ("c", "later")
    assert "images" not in found[0][0]
    without = tiny_recipe(tmp_path, "without")
    MultiLogger.open(without, step=0, warn=pytest.fail).close()
    assert not (Path(without.run_uri) / "generations.jsonl").exists()


@pytest.mark.parametrize("name", ["bad_rows.jsonl", "generations.jsonl"])
def test_a_resumed_run_names_a_line_without_its_fields(tmp_path: Path, name: str) -> None:
    recipe = tiny_recipe(tmp_path, "run", data={"eval": "easy-vqa:test"}, eval={"generate": 2})
    MultiLogger.open(recipe, step=0, warn=pytest.fail).close()
    (Path(recipe.run_uri) / name).write_text('{"id": "7"}\n')
    with pytest.raises(UserError, match=rf"{name}: line 1 is damaged\n  fix: delete the damaged line"):
        MultiLogger.open(recipe, step=5, warn=pytest.fail)


def test_wandb_offline_holds_a_table_with_images(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run", tracking={"wandb": {"enabled": True, "mode": "offline"}})
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), "red").save(buffer, "JPEG")
    answer = Generation(0, "7", "digest", "What?", "a", "b", greedy="one", sampled="two", images=(buffer.getvalue(),))
    tracker = MultiLogger.open(recipe, step=0, warn=pytest.fail)
    tracker.log(5, {"eval/loss": 1.0})
    tracker.log_generations(5, [answer])
    tracker.close()
    (file,) = tmp_path.rglob("*.wandb")
    items = [item for record in wandb_records(file) for item in record.history.item]
    logged = {"/".join([item.key, *item.nested_key]).strip("/"): json.loads(item.value_json) for item in items}
    assert logged["eval/loss"] == 1.0
    assert (logged["eval/generations/_type"], logged["eval/generations/nrows"]) == ("table-file", 1)
    (table,) = tmp_path.rglob("media/**/*.table.json")
    (row,) = json.loads(table.read_text())["data"]
    assert [row[place] for place in (0, 1, 3, 4, 5, 6, 7)] == [5, "7", "What?", "a", "b", "one", "two"]
    # The images lie beside the table, and `wandb sync` uploads them with it.
    staged = [path.read_bytes() for path in tmp_path.rglob("wandb/artifacts/staging/*")]
    assert any(data.startswith(b"\x89PNG") for data in staged)


def test_jsonl_lines_are_plain_json(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    tracker = MultiLogger.open(recipe, step=0, warn=pytest.fail)
    tracker.log(1, {"train/loss": 0.1})
    tracker.close()
    assert json.loads((Path(recipe.run_uri) / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 0.1}
