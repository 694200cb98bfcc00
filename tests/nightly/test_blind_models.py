"""Models that cannot see, or have not learned to, are called so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.commands import orpo_ray_here
from support.real_vlm import real_vlm_and_pairs
from support.runs import run
from support.tiny_runs import tiny_recipe, write_pairs


def evaluated(*arguments: str) -> dict[str, Any]:
    done = orpo_ray_here("evaluate", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def headlines(found: dict[str, Any]) -> list[str]:
    return [verdict["headline"] for verdict in found["verdicts"]]


@pytest.mark.timeout(900)
def test_a_model_trained_without_images_is_named_blind(ray_cluster: None, tmp_path: Path) -> None:
    """It learns from the texts which answers exist, and nothing about images that it gets at the evaluation."""
    pairs = write_pairs(tmp_path, 2000)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        del row["images"]
        for turn in row["prompt"]:
            turn["content"] = [part for part in turn["content"] if part["type"] == "text"]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(
        tmp_path / "runs", "blind", data={"train": str(pairs), "eval": "easy-vqa:test"},
        eval={"max_pairs": 500, "grounding": True}, optim={"max_steps": 60, "pairs_per_step": 16},
    )  # fmt: skip
    run(recipe)
    found = evaluated(recipe.run_uri)
    assert "The model does not use its images" in headlines(found)
    assert abs(found["eval/grounding_gap"]) < 0.05


@pytest.mark.timeout(1800)
def test_a_model_before_training_is_at_chance_on_nlvr(ray_cluster: None, tmp_path: Path) -> None:
    """Each sentence is true of one image and false of another, so that an untrained model gets one half."""
    model, pairs = real_vlm_and_pairs(tmp_path)
    found = evaluated(str(model), f"data.eval={pairs}", "eval.grounding=false", "eval.max_pairs=100")
    low, high = found["intervals"]["eval/rewards/accuracies"]
    assert low <= 0.5 <= high
    assert "Not distinguishable from chance" in headlines(found)
