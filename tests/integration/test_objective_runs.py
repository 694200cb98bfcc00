"""Every objective with `orpo-ray train` and `orpo-ray evaluate`: it learns, and its metrics are written."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import mean

import pytest
from rich.console import Console

from orpo_ray.config.load import parse_recipe, read_mapping
from orpo_ray.config.objectives import OBJECTIVES
from orpo_ray.errors import UserError
from orpo_ray.evaluation.evaluate_run import evaluate_run
from orpo_ray.objective.base import load_objective
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.training.launch import launch_training
from support.tiny_runs import tiny_recipe, write_pairs

QUIET = Console(file=io.StringIO())


# By default, losses are compared with TRL's (tests/unit/objective), and one is added as docs/extending.md has it.
@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "orpo"])
def test_learns_writes_and_evaluates(ray_cluster: None, name: str, tmp_path: Path) -> None:
    """On 16 pairs, the accuracy of the last ten steps beats that of the first ten."""
    pairs = str(write_pairs(tmp_path, 16))
    recipe = tiny_recipe(
        tmp_path, name, objective={"name": name}, data={"train": pairs, "eval": pairs},
        optim={"max_steps": 40, "pairs_per_step": 8},
    )  # fmt: skip
    summary = launch_training(recipe, QUIET)
    lines = [line for line in read_jsonl(Path(summary.run_uri) / "metrics.jsonl") if "train/loss" in line]
    accuracies = [line["train/rewards/accuracies"] for line in lines]
    assert len(accuracies) == 40
    assert mean(accuracies[-10:]) > max(0.9, mean(accuracies[:10]) + 0.2)
    sums = dict.fromkeys(("pairs", "loss", "nll", "logps/chosen", "logps/rejected", "accuracies"), 1.0)
    own = load_objective(recipe).metrics(sums).keys()
    assert {f"train/{metric}" for metric in own} <= lines[-1].keys()

    # The same recipe resumes the run; another objective is refused.
    assert launch_training(recipe, QUIET).was_finished
    with pytest.raises(UserError, match=r"differ in .*objective\.name"):
        launch_training(tiny_recipe(tmp_path, name, data={"train": pairs, "eval": pairs}), QUIET)

    found = evaluate_run(summary.run_uri, [], QUIET).metrics
    assert {f"eval/{metric}" for metric in own} <= found.keys()
    assert "eval/log_odds_ratio" not in found
    for metric in own:
        assert found[f"eval/{metric}"] == pytest.approx(summary.metrics[f"eval/{metric}"], abs=1e-4), metric
    saved = parse_recipe(read_mapping(Path(summary.run_uri) / "recipe.yaml"))
    assert load_objective(saved) == load_objective(recipe)
