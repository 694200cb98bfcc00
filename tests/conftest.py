"""Shared by all tests: real pairs in small files, a real Ray on this machine, recipes that take seconds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.tiny_models.easy_vqa import easy_vqa_rows

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

ROOT = Path(__file__).parent.parent
# Real data and processors that may lie beside a checkout; tests that want them say so where they are absent.
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of four logical CPUs on loopback, ended with the session."""
    import ray

    from orpo_ray.ray_cluster import own_address

    os.environ["RAY_idle_worker_killing_time_threshold_ms"] = "60000"
    os.environ["RAY_worker_niceness"] = "0"
    # "local": None would join a cluster that somebody started on this machine.
    with own_address():
        ray.init("local", num_cpus=4, log_to_driver=False, logging_level="warning", dashboard_host="127.0.0.1")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every family's tiny model without its processor, which may need what is not installed."""
    from orpo_ray.tiny_models.families import TINY_FAMILIES

    found = {}
    for name, family in TINY_FAMILIES.items():
        found[name] = str(tmp_path_factory.mktemp(name))
        family().model().save_pretrained(found[name])
    return found


def write_pairs(folder: Path, count: int, split: str = "train") -> Path:
    """`count` easy-vqa pairs as JSONL with image files beside it; returns the JSONL."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    with path.open("w") as file:
        for row in easy_vqa_rows(split)[:count]:
            image = f"images/{row['id']}.png"
            (folder / image).write_bytes(row["images"][0])
            file.write(json.dumps(row | {"images": [image]}) + "\n")
    return path


def tiny_recipe(storage: Path, name: str, **sections: Any) -> Recipe:
    """A recipe for the tiny model: 10 steps of 4 pairs unless `sections` say otherwise."""
    raw: dict[str, Any] = {
        "name": name,
        "model": {"id": "orpo-ray/tiny-smolvlm"},
        "data": {"train": "easy-vqa:train", "max_length": 128, "shuffle_window": 64},
        "orpo": {"beta": 0.5},
        "optim": {"learning_rate": 1e-3, "warmup": 2, "pairs_per_step": 4, "max_steps": 10, "epochs": 100},
        "checkpoint": {"storage": str(storage), "every_steps": 100},
        "eval": {"grounding": False},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return parse_recipe(raw)


def losses(run_dir: Path) -> dict[int, float]:
    """step -> train/loss, as a run wrote them; fails if a step stands there twice."""
    from orpo_ray.tracking.tracker import read_jsonl

    lines = [line for line in read_jsonl(run_dir / "metrics.jsonl") if "train/loss" in line]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"steps out of order or repeated: {steps}"
    return {line["step"]: line["train/loss"] for line in lines}
