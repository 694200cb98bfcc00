"""A tiny model that is not cached yet is built whole by any worker of a run."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.training.sharded_loading import load_for_training
from support.worker_group import worker_group

CPU = torch.device("cpu")


def files_of_own_cache(rank: int, num_workers: int, folder: str) -> dict[int, list[str]]:
    """Load for ZeRO 0 and 3, each with a cache of this rank's own."""
    found = {}
    before = os.environ.get("ORPO_RAY_CACHE")
    for stage in (0, 3):
        os.environ["ORPO_RAY_CACHE"] = f"{folder}/{stage}-{rank}"
        raw = {"name": "x", "model": {"id": "orpo-ray/tiny-smolvlm"}, "data": {"train": "none"}}
        load_for_training(parse_recipe(raw | {"deepspeed": {"zero_stage": stage}}), CPU)
        (built,) = Path(os.environ["ORPO_RAY_CACHE"]).iterdir()
        found[stage] = [f"{path.name} {path.stat().st_size}" for path in sorted(built.iterdir())]
    os.environ.pop("ORPO_RAY_CACHE")
    if before is not None:
        os.environ["ORPO_RAY_CACHE"] = before
    return found


def test_every_worker_builds_a_whole_model(tmp_path: Path) -> None:
    first, second = worker_group(2).run(files_of_own_cache, str(tmp_path))
    assert any(file.startswith("model.safetensors") for file in first[0])
    assert first == second
    assert first[0] == first[3]
