"""Recipes and datasets that train in seconds, and the losses of their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.tiny_models.easy_vqa import easy_vqa_rows

LONG = {"max_steps": 24}  # about a second, enough to kill a process in between


def write_pairs(folder: Path, count: int, split: str = "train") -> Path:
    """Write `count` easy-vqa pairs as a JSONL file and image files. Returns the path of the JSONL file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    with path.open("w") as file:
        for row in easy_vqa_rows(split)[:count]:
            image = f"images/{row['id']}.png"
            (folder / image).write_bytes(row["images"][0])
            file.write(json.dumps(row | {"images": [image]}) + "\n")
    return path


def write_ranked(folder: Path, count: int, images: int, answers: int = 4) -> Path:
    """Write rows as VLFeedback has them, about a few images, with this many rated answers, the best one last."""
    rows = [json.loads(line) for line in write_pairs(folder, count).read_text().splitlines()]
    ranked = [
        {
            "id": row["id"],
            "prompt": "What is there?",
            "img_path": rows[number % images]["images"][0],
            "completions": [
                {"response": f"answer {number} {place}", "annotations": {"Helpfulness": {"Rating": str(place)}}}
                for place in range(answers)
            ],
        }
        for number, row in enumerate(rows)
    ]
    path = folder / "ranked.jsonl"
    path.write_text("\n".join(map(json.dumps, ranked)) + "\n")
    return path


def tiny_recipe(storage: Path, name: str, **sections: Any) -> Recipe:
    """Return a recipe for the tiny model: 10 steps of 4 pairs. `sections` override its fields."""
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
    if "objective" in sections:
        del raw["orpo"]
    return parse_recipe(raw)


def losses(run_dir: Path) -> dict[int, float]:
    """Read step -> train/loss of a run. Fails if a step occurs twice."""
    from orpo_ray.tracking.jsonl import read_jsonl

    lines = [line for line in read_jsonl(run_dir / "metrics.jsonl") if "train/loss" in line]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"steps out of order or repeated: {steps}"
    return {line["step"]: line["train/loss"] for line in lines}


def same_curve(run_dir: Path, reference: dict[int, float], tolerance: float = 1e-4) -> None:
    """Assert that a run has these losses."""
    assert losses(run_dir) == pytest.approx(reference, abs=tolerance)
