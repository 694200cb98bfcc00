"""The multilingual recipe, from its generated rows to the report: right-to-left and Chinese characters survive."""

from __future__ import annotations

import io
import json
import re
import runpy
from pathlib import Path

import pytest
from rich.console import Console

from orpo_ray.config.load import load_recipe
from orpo_ray.data_report.check import check_data
from orpo_ray.evaluation.evaluate_run import evaluate_run
from orpo_ray.report.page import write_report
from orpo_ray.tracking.jsonl import read_jsonl
from support.paths import ROOT
from support.runs import run

pytestmark = pytest.mark.usefixtures("ray_cluster")

QUIET = Console(file=io.StringIO())
LANGUAGES = ("ar", "hi", "ja", "ru")


def test_rows_in_four_scripts_train_with_weights_and_keep_their_texts(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "recipes" / "own-data" / "make_pairs.py"))
    script["main"](tmp_path / "pairs", "train", 8)
    script["main"](tmp_path / "pairs", "test", 4)
    overrides = [
        f"data.train={tmp_path}/pairs/train.jsonl", f"data.eval={tmp_path}/pairs/test.jsonl",
        "data.weights.language.ar=2", f"checkpoint.storage={tmp_path}/runs", "optim.pairs_per_step=8",
        "optim.epochs=1", "eval.generate=4", "eval.max_new_tokens=4",
    ]  # fmt: skip
    recipe = load_recipe(ROOT / "recipes" / "own-data-multilingual.yaml", overrides)
    folder = tmp_path / "runs" / recipe.name

    report, page = check_data(recipe, QUIET)
    assert {each["name"]: each["rows"] for each in report["train"]["languages"]} == dict.fromkeys(LANGUAGES, 8)
    assert all(0.3 < each["tokens_per_character"] < 4 for each in report["train"]["languages"])
    assert report["train"]["warnings"] == []

    run(recipe)
    lines = read_jsonl(folder / "metrics.jsonl")
    assert sum("train/loss" in line for line in lines) == (3 * 8 + 2 * 8) // 8  # Arabic rows twice
    figures = lines[-1]
    for name in LANGUAGES:
        assert figures[f"eval/pairs/language/{name}"] == 4
        assert 0 <= figures[f"eval/rewards/accuracies/language/{name}"] <= 1
        assert -1 <= figures[f"eval/grounding_gap/language/{name}"] <= 1
    mean = sum(figures[f"eval/rewards/accuracies/language/{name}"] for name in LANGUAGES) / 4
    assert mean == pytest.approx(figures["eval/rewards/accuracies"])

    evaluation = evaluate_run(str(folder), [], QUIET)
    assert evaluation.metrics["eval/rewards/margins/language/ja"] == pytest.approx(
        figures["eval/rewards/margins/language/ja"], abs=1e-4
    )
    assert [group["name"] for group in evaluation.as_json()["breakdowns"]["language"]] == [*LANGUAGES]

    answered = (folder / "generations.jsonl").read_text(encoding="utf-8")
    questions = {json.loads(line)["prompt"] for line in answered.splitlines()}
    assert questions <= {*script["QUESTIONS"].values()}
    for html in (Path(each).read_text(encoding="utf-8") for each in (page, write_report([str(folder)]))):
        for name in ("ar", "ja"):
            shown = re.findall(r'<(?:p|td)[^>]* dir="auto"[^>]*>(?:<span[^>]*>)?([^<]*)', html)
            assert any(script["QUESTIONS"][name] in text for text in shown), name
            assert f"<bdi>{name}</bdi>" in html
