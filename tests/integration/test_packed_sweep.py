"""Sweeps whose trials train side by side in one process: each is the run that it would be alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from orpo_ray.config.load import parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from support.commands import orpo_ray_here
from support.runs import run, wait_until
from support.tiny_runs import losses, same_curve, tiny_recipe

SECTIONS: dict[str, Any] = {
    "model": {"lora": {"r": 4}, "freeze": ["vision"]},
    "data": {"eval": "easy-vqa:test"},
    "eval": {"max_pairs": 16, "every_steps": 4},
}


def sweep_of(folder: Path, name: str, steps: int = 8, **tune: Any) -> Recipe:
    optim = {"max_steps": steps, "schedule": "constant"}
    recipe = tiny_recipe(folder, name, optim=optim, tune={"scheduler": "none"} | tune, **SECTIONS)
    (folder / f"{name}.yaml").write_text(recipe.to_yaml())
    return recipe


def record_of(recipe: Recipe) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = json.loads((Path(recipe.run_uri) / "sweep.json").read_text())["trials"]
    return trials


@pytest.mark.timeout(300)
def test_packed_trials_are_the_runs_that_they_would_be_alone(ray_cluster: None, tmp_path: Path) -> None:
    recipe = sweep_of(tmp_path, "packed", num_trials=2, pack=2)
    done = orpo_ray_here("tune", str(tmp_path / "packed.yaml"))
    assert done.returncode == 0, done.stderr
    assert "2 trials of 8 steps, 2 at a time, up to 2 on one model" in done.stderr
    folder = Path(recipe.run_uri)
    assert [trial["state"] for trial in record_of(recipe)] == ["finished", "finished"]
    trial = folder / "trials" / "0001"
    raw = read_mapping(trial / "recipe.yaml")
    alone = parse_recipe(raw | {"name": "alone"})
    run(alone)
    same_curve(trial, losses(Path(alone.run_uri)))
    mine, other = (load_file(Path(uri) / "final" / "adapter_model.safetensors") for uri in (trial, alone.run_uri))
    for name, weight in other.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-4, atol=1e-4, msg=name)
    there, here = ({path.name for path in Path(uri).glob("[!c]*")} for uri in (alone.run_uri, trial))  # no checkpoints
    missing = there - here
    assert missing == {"eval_tokens.json", ".validate_storage_marker"}  # the latter is Ray Train's
    # Both runs evaluate at the same steps.
    evaluated = [line["step"] for line in record_of(recipe)[1]["history"]]
    assert evaluated == [4, 8]
    again = orpo_ray_here("tune", str(tmp_path / "packed.yaml"))
    assert "This sweep is over already" in again.stderr


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_pack_whose_process_is_killed_goes_on(ray_cluster: None, tmp_path: Path) -> None:
    """From the checkpoints, with the curve of an uninterrupted pack."""

    import ray
    from ray.util.state import list_actors

    whole = sweep_of(tmp_path, "whole", steps=40, num_trials=3, pack=3)
    assert orpo_ray_here("tune", str(tmp_path / "whole.yaml")).returncode == 0
    killed = sweep_of(tmp_path, "killed", steps=40, num_trials=3, pack=3)
    address = ray.get_runtime_context().gcs_address
    metrics = Path(killed.run_uri) / "trials" / "0002" / "metrics.jsonl"

    def kill() -> None:
        wait_until(lambda: metrics.exists() and len(losses(metrics.parent)) >= 10, "step 10")
        alive = [("class_name", "=", "Host"), ("state", "=", "ALIVE")]
        (pack,) = list_actors(address, filters=alive, detail=True)
        psutil.Process(pack.pid).kill()

    thread = threading.Thread(target=kill)
    thread.start()
    done = orpo_ray_here("tune", str(tmp_path / "killed.yaml"), "checkpoint.every_steps=4")
    thread.join()
    assert done.returncode == 0, done.stderr
    assert {trial["state"] for trial in record_of(killed)} == {"finished"}
    for name in ("0000", "0001", "0002"):
        same_curve(Path(killed.run_uri) / "trials" / name, losses(Path(whole.run_uri) / "trials" / name))


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_trial_that_is_stopped_early_leaves_its_pack(ray_cluster: None, tmp_path: Path) -> None:
    """At once, while the others go on to their end; a second pack takes its place when all of the first have left."""
    search = {"optim.learning_rate": {"choices": [1e-3, 1e-7]}}
    recipe = sweep_of(
        tmp_path, "stopped", steps=40, num_trials=4, pack=2, max_concurrent=2, scheduler="asha", search=search
    )
    done = orpo_ray_here("tune", str(tmp_path / "stopped.yaml"))
    assert done.returncode == 0, done.stderr
    states = [trial["state"] for trial in record_of(recipe)]
    assert "stopped early" in states
    assert "finished" in states
    for trial in record_of(recipe):
        folder = Path(recipe.run_uri) / "trials" / f"{trial['number']:04d}"
        assert (folder / "final").exists() == (trial["state"] == "finished")
        assert not (folder / "lease.json").exists()
        if trial["state"] == "stopped early":
            assert max(losses(folder)) < 40
