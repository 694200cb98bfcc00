"""A pretrained model on human data: a few steps, with finite and decreasing loss."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from orpo_ray.config.load import parse_recipe
from orpo_ray.training.launch import launch_training
from support.paths import SHARED
from support.tiny_runs import losses


@pytest.mark.timeout(900)
def test_a_pretrained_vlm_learns_on_nlvr(ray_cluster: None, tmp_path: Path) -> None:
    tool, data = SHARED / "tools" / "assemble_real_vlm.py", SHARED / "data" / "nlvr"
    if not tool.is_file() or not data.is_dir():
        pytest.skip(f"{SHARED} is absent: it has the pretrained halves and the pairs of this test")
    model = tmp_path / "vlm"
    subprocess.run([sys.executable, str(tool), str(model)], check=True, capture_output=True)
    recipe = parse_recipe(
        {
            "name": "real",
            "model": {"id": str(model)},
            "data": {"train": str(data / "pairs.jsonl")},
            "optim": {"learning_rate": 2e-5, "warmup": 1, "pairs_per_step": 2, "max_steps": 6},
            "checkpoint": {"storage": str(tmp_path / "runs"), "every_steps": 100},
        }
    )
    curve = losses(Path(launch_training(recipe, Console(file=io.StringIO())).run_uri))
    assert len(curve) == 6
    assert all(math.isfinite(loss) for loss in curve.values())
    assert curve[6] < curve[1] - 0.1
