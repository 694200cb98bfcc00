"""Benchmarks can be started: each one's imports exist in the package as it is. Some of what they count is checked."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.synthesis.identity import identity_of
from orpo_ray.synthesis.local_model import LocalModel
from orpo_ray.synthesis.source import source_rows
from support.paths import ROOT
from support.synthesis import synthesis_recipe, write_questions


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_it_is_importable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(path, monkeypatch).__doc__


def test_what_a_start_and_an_end_call_does_not_count_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers: 8 more steps have 16 more shares and 8 more lines of status."""
    benchmark = load(ROOT / "benchmarks" / "control_calls.py", monkeypatch)
    short = Counter({"StepFeed.take": 4, "RunStatus.update": 9, "RunStatus.state": 30})
    long = Counter({"StepFeed.take": 20, "RunStatus.update": 17, "RunStatus.state": 50})
    assert benchmark.per_step(short, long, 8) == {"share of a step": 2.0, "status, by rank 0": 1.0}


def test_the_reading_rate_is_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load(ROOT / "benchmarks" / "reading_rate.py", monkeypatch)
    found = benchmark.measure(150, 1000, 1)
    assert (found["rows"], found["image_kb"]) == (150, 1.0)
    # Each row is its image and some 900 bytes of text, which compress well.
    assert 1000 <= 1e6 * found["mb_per_cpu_s"] / found["rows_per_cpu_s"] <= 2000


def test_the_agreement_of_labels_with_a_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row n has the margin n / 10 + 0.05; the first five labels are wrong, the last five right."""
    benchmark = load(ROOT / "benchmarks" / "label_agreement.py", monkeypatch)
    path = write_questions(tmp_path / "rows", 10)
    recipe = synthesis_recipe(tmp_path, "set", path)
    data = tmp_path / "set" / "data"
    (data / "candidates").mkdir(parents=True)
    identity = identity_of(recipe, source_rows(recipe), LocalModel(recipe).target)
    (data / "synthesis.json").write_text(json.dumps(identity))
    manifest = {"model": recipe.model.id, "data": recipe.model_dump(mode="json")["data"]}
    (data / "manifest.json").write_text(json.dumps(manifest))
    lines = []
    for place, row in enumerate(map(json.loads, path.read_text().splitlines())):
        right, wrong = {"text": row["answer"]}, {"text": "neither"}
        best, worst = (wrong, right) if place < 5 else (right, wrong)
        candidates = [best | {"score": place / 10 + 0.05}, worst | {"score": 0.0}]
        lines.append(json.dumps({"id": row["id"], "outcome": "pair", "candidates": candidates}))
    (data / "candidates" / "00000.jsonl").write_text("\n".join(lines) + "\n")
    for margin, pairs, agreement in ((0.0, 10, 0.5), (0.24, 8, 5 / 8), (0.5, 5, 1.0)):
        found = benchmark.measure(tmp_path / "set", margin)
        assert (found["min_margin"], found["pairs"], found["pairs_with_one_right"]) == (margin, pairs, pairs)
        ratio = found["agreement_ratio"]
        assert ratio["value"] == pytest.approx(agreement)
        assert ratio["low"] < agreement <= ratio["high"]
    with pytest.raises(SystemExit, match=r"no pair of .* has a margin of 2 or more"):
        benchmark.measure(tmp_path / "set", 2.0)
    found = benchmark.measure(tmp_path / "set")
    assert found["right_chosen"]["value"] == 0.5


@pytest.mark.parametrize("lora", [False, True])
def test_a_seed_changes_the_order_of_pairs_and_adapters_but_no_weight_of_a_full_training(
    lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load(ROOT / "benchmarks" / "grounding.py", monkeypatch)
    overrides = ["model.lora.r=2"] if lora else []
    orders, weights = [], []
    for seed in (0, 1):
        recipe = benchmark.seeded(ROOT / "recipes" / "quickstart-grounded.yaml", overrides, seed)
        experiment = benchmark.Experiment(recipe)
        orders.append(experiment.train.order.window(0, 0).rows[:20].tolist())
        weights.append([weight.detach() for weight in experiment.model.parameters() if weight.requires_grad])
        assert experiment.held_out.order.seed == 0
    assert orders[0] != orders[1]
    assert weights[0]
    assert all(map(torch.equal, *weights)) is not lora


def test_the_report_of_grounding_says_how_many_pairs_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load(ROOT / "benchmarks" / "grounding.py", monkeypatch)
    run = {"rewards/accuracies": 0.7, "grounding_gap": 0.1, "training_seconds": 2.0, "pairs": 300.0}
    found = benchmark.summary(
        {"plain": [run, run], "image": [run | {"grounding_pairs": 299.0}, run | {"pairs": 298.0}]}
    )
    assert found["plain"]["held_out_pairs"] == {"own images": [300], "exchanged images": []}
    assert found["image"]["held_out_pairs"] == {"own images": [298, 300], "exchanged images": [299]}
