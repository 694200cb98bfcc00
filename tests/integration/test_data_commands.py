"""`orpo-ray data check` and `data prepare` on a real Ray cluster, and training from prepared data."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_ray.data.formats import to_pair
from orpo_ray.data.from_recipe import all_data
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import pair_of
from orpo_ray.data_report.check import check_data
from orpo_ray.data_report.prepare import prepare_data
from orpo_ray.errors import UserError
from orpo_ray.evaluation.evaluate_run import evaluate_run
from orpo_ray.exporting.model_card import CardFacts, render_model_card
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.training.launch import launch_training
from support.broken_rows import KINDS, write_broken
from support.sources import read_all
from support.tiny_runs import losses, tiny_recipe, write_pairs

pytestmark = pytest.mark.usefixtures("ray_cluster")

QUIET = Console(file=io.StringIO())
ADAPTER = """
def to_pair(row):
    if row["ask"] == "boom":
        raise ValueError("boom")
    return {"image": row["picture"], "prompt": row["ask"], "chosen": row["good"], "rejected": row["bad"]}
"""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command, which unlike `python -m` does not import from the working directory."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    whole = [str(Path(sys.executable).parent / "orpo-ray"), *arguments]
    return subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_check_then_prepare_then_train(tmp_path: Path) -> None:
    path, broken = write_broken(tmp_path / "set", 120, 1)
    path.write_text(path.read_text().replace('{"id": ', '{"topic": "shapes", "id": '))
    write_pairs(tmp_path / "set", 20, "test")
    data: dict[str, Any] = {"train": str(path), "eval": str(tmp_path / "set" / "test.jsonl"), "max_bad_fraction": 0.0}
    data |= {"domain": "topic"}
    recipe = tiny_recipe(tmp_path / "runs", "set", data=data)
    folder = tmp_path / "runs" / "set"

    report, page = check_data(recipe, QUIET)
    assert json.loads((folder / "data_check.json").read_text()) == report
    train = report["train"]
    # Pairs that are too long are counted separately, since they depend on the recipe's limit.
    assert train["bad"]["by_reason"] == dict.fromkeys(set(KINDS) - {"too_long"}, 1)
    assert (train["rows"], train["pairs"], train["too_long"]["count"]) == (120, 110, 1)
    assert report["eval"]["rows"] == report["eval"]["pairs"] == 20
    assert report["images_on_both_sides"] == 0
    for kind, name in (("languages", "Latin"), ("domains", "shapes")):
        (group,) = train[kind]
        assert (group["name"], group["rows"], group["too_long"]) == (name, 111, 1)
    written = {row["source"]: row["reason"] for row in read_jsonl(folder / "bad_rows.jsonl")}
    assert written == {source: kind for source, kind in broken.items() if kind != "too_long"}
    assert page == str(folder / "data_check.html")
    text = Path(page).read_text()
    assert text.count("data:image/jpeg;base64,") > 30
    assert "easy-vqa-train-" in text

    with pytest.raises(UserError, match="10 of 120 rows cannot be used"):
        prepare_data(recipe, QUIET)
    with pytest.raises(UserError, match=r"data\.on_too_long"):
        prepare_data(tiny_recipe(tmp_path / "runs", "set", data=data | {"on_too_long": "error"}), QUIET)
    recipe = tiny_recipe(tmp_path / "runs", "set", data=data | {"max_bad_fraction": 0.1})
    splits = prepare_data(recipe, QUIET)
    assert {name: split.rows for name, split in splits.items()} == {"train": 110, "eval": 20}
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    assert manifest["splits"]["train"] == {"rows": 110, "bad_rows": 10, "shards": {"00000.parquet": 110}}
    assert {row["source"]: row["reason"] for row in read_jsonl(folder / "bad_rows.jsonl")} == broken
    with pytest.raises(UserError, match="already exists"):
        prepare_data(recipe, QUIET)

    # The prepared rows equal the original ones, including image bytes.
    from_prepared = tiny_recipe(
        tmp_path / "runs",
        "from-prepared",
        data={name: split.uri for name, split in splits.items()} | {"domain": "topic"},
    )
    read, _ = all_data(from_prepared)
    found = {pair.id: pair for pair in map(pair_of, read_all(read)) if isinstance(pair, PreferencePair)}
    assert len(found) == 110
    assert {pair.domain for pair in found.values()} == {"shapes"}
    rows = [row for line, row in enumerate(_rows(path), 1) if f"{path}:line {line}" not in broken]
    for row in rows:
        source, pair = to_pair(row, "trl", {}, "x"), found[row["id"]]
        assert (pair.prompt, pair.chosen, pair.rejected) == (source.prompt, source.chosen, source.rejected)
        assert pair.images[0]["bytes"] == (path.parent / row["images"][0]).read_bytes()
    # A model card names what the set was prepared from, not the folder of the set.
    card = render_model_card(CardFacts(from_prepared, "whole", {"eval/rewards/accuracies": 0.9}, None, {}))
    assert f"Trained on `{path.name}`" in card
    assert "from `test.jsonl`" in card

    launch_training(from_prepared, QUIET)
    assert sorted(losses(tmp_path / "runs" / "from-prepared")) == list(range(1, 11))


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) if line.startswith('{"') else None for line in path.read_text().splitlines()]


@pytest.mark.nightly
def test_an_adapter_in_the_working_directory_works_in_every_process(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 30)
    rows = [
        {"picture": row["images"][0], "ask": row["prompt"][0]["content"][1]["text"], "good": row["chosen"],
         "bad": row["rejected"]}
        for row in _rows(path)
    ]  # fmt: skip
    rows[4]["ask"] = "boom"
    path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_rows.py").write_text(ADAPTER)
    recipe = tiny_recipe(tmp_path / "runs", "adapted", data={"train": str(path), "format": "my_rows:to_pair"})
    (tmp_path / "adapted.yaml").write_text(recipe.to_yaml())
    trained = command(tmp_path, "train", "adapted.yaml", "optim.max_steps=8", "data.max_bad_fraction=0.5")
    assert trained.returncode == 0, trained.stderr
    (bad,) = read_jsonl(tmp_path / "runs" / "adapted" / "bad_rows.jsonl")
    assert (bad["source"], bad["reason"], bad["detail"]) == (f"{path}:line 5", "adapter_failed", "ValueError: boom")
    unknown = command(tmp_path, "train", "adapted.yaml", "data.format=my_rows:nothing", "name=b")
    assert unknown.returncode == 2
    assert "has no function nothing" in unknown.stderr


def test_a_fraction_of_the_training_rows_is_held_out(tmp_path: Path) -> None:
    """`orpo-ray evaluate` splits again and gets the same held-out pairs, so the same metrics."""
    path = write_pairs(tmp_path, 60)
    recipe = tiny_recipe(tmp_path / "runs", "split", data={"train": str(path), "eval_fraction": 0.2})
    said = io.StringIO()
    launch_training(recipe, Console(file=said, width=200))
    train, held = all_data(recipe)
    assert held is not None
    paths = [{image["path"] for row in read_all(split) for image in row["images"]} for split in (train, held)]
    assert not paths[0] & paths[1]
    assert f"{60 - held.order.num_rows} pairs (trl format), {held.order.num_rows} held out" in said.getvalue()
    scored = evaluate_run(str(tmp_path / "runs" / "split"), [], QUIET).metrics
    last = [line for line in read_jsonl(tmp_path / "runs" / "split" / "metrics.jsonl") if "eval/loss" in line][-1]
    assert scored["eval/loss"] == pytest.approx(last["eval/loss"], abs=1e-4)
