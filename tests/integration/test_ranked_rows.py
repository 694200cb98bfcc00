"""Training on all pairs of ranked rows, grouped by image: as trees, with any number of workers, after a resume."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_ray.training.launch import launch_training
from support.runs import run
from support.tiny_runs import losses, same_curve, tiny_recipe, write_ranked


def test_a_run_goes_on_within_a_window_with_another_number_of_workers(ray_cluster: None, tmp_path: Path) -> None:
    """Steps of 4 rows of 6 pairs, windows of 16 rows; the checkpoint is within the second one."""
    path = write_ranked(tmp_path, 24, images=5)
    sections: dict[str, Any] = {
        "data": {"train": str(path), "shuffle_window": 16, "group": "auto", "pairs_from_ranking": "all"},
        "checkpoint": {"every_steps": 5},
        "optim": {"max_steps": 8},
    }
    folder = Path(run(tiny_recipe(tmp_path, "ranked", **sections)).run_uri)
    expected = losses(folder)
    assert len(expected) == 8
    (folder / "final").rename(folder / "was-final")
    first = min(path.name for path in folder.glob("checkpoint_*"))
    position = json.loads((folder / first / "position.json").read_text())
    assert (position["step"], position["seen"]) == (5, 5 * 4 * 6)
    more = tiny_recipe(tmp_path, "ranked", scaling={"num_workers": 2}, **sections)
    launch_training(more, Console(file=io.StringIO()), from_checkpoint=first)
    same_curve(folder, expected)


@pytest.mark.nightly
def test_small_micro_batches_and_separate_pairs_give_the_same_curve(ray_cluster: None, tmp_path: Path) -> None:
    """A budget that cuts trees, and the concatenated layout, which has none."""
    data = {"train": str(write_ranked(tmp_path, 24, images=5)), "group": "auto", "pairs_from_ranking": "all"}
    expected = losses(Path(run(tiny_recipe(tmp_path, "trees", data=data)).run_uri))
    variants: dict[str, dict[str, Any]] = {
        "cut": {"optim": {"tokens_per_microbatch": 60}},
        "apart": {"model": {"attention": "concatenated"}},
        "sharded": {"deepspeed": {"zero_stage": 3}, "scaling": {"num_workers": 2}},
    }
    for name, sections in variants.items():
        same_curve(Path(run(tiny_recipe(tmp_path, name, data=data, **sections)).run_uri), expected)
