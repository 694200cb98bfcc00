"""A run through thirty faults ends as it would have without them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.recipe import Recipe
from orpo_ray.tracking.jsonl import read_jsonl
from support.broken_rows import KINDS, write_broken
from support.clusters import cluster_of
from support.commands import orpo_ray
from support.paths import TESTS
from support.storm import MAX_NODES, Storm
from support.tiny_runs import losses, tiny_recipe

ROWS, OF_EACH, PER_STEP = 400, 1, 4
BAD = OF_EACH * len(KINDS)


def recipe_of(folder: Path, name: str, data: Path, epochs: int, adapter: str, **sections: Any) -> Recipe:
    return tiny_recipe(
        folder,
        name,
        data={"train": str(data), "format": f"support.slow_rows:{adapter}", "shuffle_window": 16},
        optim={"epochs": epochs, "max_steps": None, "pairs_per_step": PER_STEP},
        **sections,
    )


def calm_curve(folder: Path, data: Path, epochs: int) -> dict[int, float]:
    """Losses of one worker on its own Ray, without sharding and without faults."""
    recipe = recipe_of(folder, "calm", data, epochs, "quickly")
    path = folder / "calm.yaml"
    path.write_text(recipe.to_yaml())
    done = orpo_ray("train", str(path), env={"RAY_ADDRESS": ""})
    assert done.returncode == 0, done.stderr
    return losses(Path(recipe.run_uri))


@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize(("seed", "num_faults", "epochs"), [(1, 30, 3), (2, 30, 3), (3, 30, 3), (4, 7, 1)])
def test_every_pair_is_trained_once_an_epoch_in_a_storm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, num_faults: int, epochs: int
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    data, reasons = write_broken(tmp_path / "data", ROWS, OF_EACH)
    stormy = recipe_of(
        tmp_path, "stormy", data, epochs, "in_turn",
        checkpoint={"every_steps": 5, "keep": 3},
        deepspeed={"zero_stage": 2},
        scaling={"num_workers": [1, 2], "cpus_per_worker": 1.6, "resize_interval_s": 2, "max_failures": 100},
    )  # fmt: skip
    num_steps = epochs * ROWS // PER_STEP
    with cluster_of(1 + MAX_NODES) as cluster:
        storm = Storm(cluster, stormy, tmp_path, seed)
        try:
            storm.rage(num_faults, num_steps)
        finally:
            storm.stop()
        assert len(storm.planted) == num_faults
    folder = Path(stormy.run_uri)
    curve = losses(folder)
    assert sorted(curve) == list(range(1, num_steps + 1))
    position = json.loads(max(folder.glob("checkpoint_*/position.json")).read_text())
    assert (position["step"], position["seen"], position["bad"]) == (num_steps, epochs * ROWS, epochs * BAD)
    found = read_jsonl(folder / "bad_rows.jsonl")
    assert {row["source"]: row["reason"] for row in found} == reasons
    assert len(found) == BAD
    assert curve == pytest.approx(calm_curve(tmp_path, data, epochs), abs=1e-4)
