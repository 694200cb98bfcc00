"""A pretrained model on human data: a few steps, with finite and decreasing loss."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from orpo_ray.config.load import parse_recipe
from orpo_ray.training.launch import launch_training
from support.real_vlm import real_vlm_and_pairs
from support.tiny_runs import losses


@pytest.mark.timeout(900)
def test_a_pretrained_vlm_learns_on_nlvr(ray_cluster: None, tmp_path: Path) -> None:
    model, pairs = real_vlm_and_pairs(tmp_path)
    recipe = parse_recipe(
        {
            "name": "real",
            "model": {"id": str(model)},
            "data": {"train": str(pairs)},
            "optim": {"learning_rate": 2e-5, "warmup": 1, "pairs_per_step": 2, "max_steps": 6},
            "checkpoint": {"storage": str(tmp_path / "runs"), "every_steps": 100},
        }
    )
    curve = losses(Path(launch_training(recipe, Console(file=io.StringIO())).run_uri))
    assert len(curve) == 6
    assert all(math.isfinite(loss) for loss in curve.values())
    assert curve[6] < curve[1] - 0.1
