"""Whole commands on the GPU: a run without a CUDA compiler, and two trials that share the GPU."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from support.commands import orpo_ray
from support.tiny_runs import losses, tiny_recipe

pytestmark = pytest.mark.gpu
STEPS = 40  # of a trial


def without_compiler(folder: Path) -> dict[str, str]:
    """Environment variables with which no process finds nvcc."""
    folder.mkdir()
    paths = [path for path in os.environ["PATH"].split(os.pathsep) if not (Path(path) / "nvcc").exists()]
    return {"PATH": os.pathsep.join(paths), "CUDA_HOME": str(folder), "CUDA_PATH": str(folder)}


@pytest.mark.parametrize("stage", [0, 2])
def test_trains_where_there_is_no_cuda_compiler(stage: int, tmp_path: Path, device: torch.device) -> None:
    environment = without_compiler(tmp_path / "no-cuda")
    assert shutil.which("nvcc", path=environment["PATH"]) is None
    recipe = tiny_recipe(
        tmp_path / "runs", "no-nvcc", optim={"max_steps": 4}, deepspeed={"zero_stage": stage}
    ).to_yaml()
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = orpo_ray("train", str(tmp_path / "recipe.yaml"), cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert sorted(losses(tmp_path / "runs" / "no-nvcc")) == [1, 2, 3, 4]


def test_two_trials_share_the_gpu(tmp_path: Path, device: torch.device) -> None:
    """Both train at the same time: there is a moment when both have logged a step and neither the last."""
    share = {"gpus_per_worker": 0.5 if device.type == "cuda" else 0}
    recipe = tiny_recipe(
        tmp_path / "runs", "shared", data={"eval": "easy-vqa:test"}, eval={"max_pairs": 16, "every_steps": STEPS},
        optim={"max_steps": STEPS}, scaling=share,
        tune={"num_trials": 2, "max_concurrent": 2, "scheduler": "none"},
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    folder, together = tmp_path / "runs" / "shared" / "trials", False
    with ThreadPoolExecutor(1) as pool:
        sweep = pool.submit(orpo_ray, "tune", str(tmp_path / "recipe.yaml"), cwd=tmp_path)
        while not sweep.done():
            counts = [len(losses(file.parent)) for file in folder.glob("*/metrics.jsonl")]
            together = together or (len(counts) == 2 and all(0 < count < STEPS for count in counts))
            time.sleep(0.05)
    result = sweep.result()
    assert result.returncode == 0, result.stderr
    assert [len(losses(trial)) for trial in folder.iterdir()] == [STEPS, STEPS]
    assert together
