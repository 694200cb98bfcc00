"""Trials that follow each other in one process: each is the run that it would be alone."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from orpo_ray.config.load import parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from support.commands import orpo_ray, orpo_ray_here
from support.dying_rows import DEATHS, ROW, TIMES
from support.paths import TESTS
from support.runs import run, wait_until
from support.tiny_runs import losses, same_curve, tiny_recipe, write_pairs

RATE = "optim.learning_rate"


def sweep_of(folder: Path, name: str, rates: list[float], steps: int = 8, **data: Any) -> Recipe:
    """Write the recipe of a sweep of one trial at a time."""
    recipe = tiny_recipe(
        folder, name, data={"eval": "easy-vqa:test"} | data, eval={"max_pairs": 16, "every_steps": 4},
        optim={"max_steps": steps, "schedule": "constant"}, checkpoint={"every_steps": 4},
        tune={"search": {RATE: {"choices": rates}}, "searcher": "grid", "scheduler": "none", "max_concurrent": 1},
    )  # fmt: skip
    (folder / f"{name}.yaml").write_text(recipe.to_yaml())
    return recipe


def hosts() -> list[Any]:
    """Return all host actors that this Ray has had."""
    import ray
    from ray.util.state import list_actors

    return list_actors(ray.get_runtime_context().gcs_address, filters=[("class_name", "=", "Host")], detail=True)


@pytest.mark.timeout(300)
def test_trials_follow_each_other_in_one_process(ray_cluster: None, tmp_path: Path) -> None:
    """Also after one that diverges; and each has the losses, files and evaluations of its run alone."""
    before = len(hosts())
    recipe = sweep_of(tmp_path, "hosted", [1e12, 2e-3, 1e-3])  # shuffled: the one that diverges is second
    done = orpo_ray_here("tune", str(tmp_path / "hosted.yaml"))
    assert done.returncode == 0, done.stderr
    assert len(hosts()) - before == 1
    folder = Path(recipe.run_uri)
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["finished", "failed", "finished"]
    assert "not finite" in trials[1]["error"]
    assert [line["step"] for line in trials[2]["history"]] == [4, 8]
    last = folder / "trials" / "0002"
    alone = parse_recipe(read_mapping(last / "recipe.yaml") | {"name": "alone"})
    run(alone)
    same_curve(last, losses(Path(alone.run_uri)))
    there, here = ({path.name for path in Path(uri).glob("[!c]*")} for uri in (alone.run_uri, last))  # no checkpoints
    assert there - here == {".validate_storage_marker"}  # of Ray Train


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_trial_whose_host_is_killed_goes_on(ray_cluster: None, tmp_path: Path) -> None:
    """From its checkpoint, with the curve of an uninterrupted trial; the next trial gets another host."""
    whole = sweep_of(tmp_path, "whole", [1e-3, 2e-3], steps=40)
    assert orpo_ray_here("tune", str(tmp_path / "whole.yaml")).returncode == 0
    before = len(hosts())
    killed = sweep_of(tmp_path, "killed", [1e-3, 2e-3], steps=40)
    first = Path(killed.run_uri) / "trials" / "0000"

    def kill() -> None:
        wait_until(lambda: (first / "metrics.jsonl").exists() and len(losses(first)) >= 10, "step 10")
        (host,) = [each for each in hosts() if each.state == "ALIVE"]
        psutil.Process(host.pid).kill()

    thread = threading.Thread(target=kill)
    thread.start()
    done = orpo_ray_here("tune", str(tmp_path / "killed.yaml"))
    thread.join()
    assert done.returncode == 0, done.stderr
    assert len(hosts()) - before == 2
    for name in ("0000", "0001"):
        same_curve(Path(killed.run_uri) / "trials" / name, losses(Path(whole.run_uri) / "trials" / name))


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_trial_goes_on_after_an_error_that_may_not_come_again(tmp_path: Path) -> None:
    """In the same process, with the steps before the error: a row ends the process that reads it, until it does not."""
    pairs = write_pairs(tmp_path, 400)
    deadly = json.loads(pairs.read_text().splitlines()[350])["id"]
    recipe = sweep_of(
        tmp_path, "unlucky", [1e-3], steps=100, train=str(pairs), format="support.dying_rows:dying", shuffle_seed=None
    )
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    deaths = tmp_path / "deaths"
    environment = {"PYTHONPATH": path, DEATHS: str(deaths), ROW: str(deadly), "RAY_ADDRESS": ""}
    done = orpo_ray("tune", str(tmp_path / "unlucky.yaml"), "checkpoint.every_steps=1000", env=environment)
    assert done.returncode == 0, done.stderr
    assert len(deaths.read_bytes()) == TIMES
    assert sorted(losses(Path(recipe.run_uri) / "trials" / "0000")) == list(range(1, 101))
