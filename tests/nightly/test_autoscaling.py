"""Runs that ask a cluster for nodes which do not exist yet. The nodes are raylets of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_ray.config.recipe import Recipe
from support.autoscaling import IDLE_MINUTES, Head, autoscaling_head
from support.clusters import workers_by_step
from support.paths import TESTS
from support.runs import last_step, run, wait_until
from support.tiny_runs import LONG, losses, tiny_recipe, write_pairs

LIMIT_S = 900  # of a command, whose first step takes 70 s on a quiet machine and took 313 s on a busy one


@pytest.fixture(autouse=True)
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of a cluster import `support.slow_rows`."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))


def orpo_ray_on(head: Head, command: str, recipe: Recipe, folder: Path, exit_code: int = 0) -> tuple[float | None, str]:
    """Run a command to its end; return the seconds until the first step of a run, and what the command said."""
    path, run_dir = folder / f"{recipe.name}.yaml", Path(recipe.run_uri)
    path.write_text(recipe.to_yaml())
    began, first = time.monotonic(), None
    process = subprocess.Popen(
        [sys.executable, "-m", "orpo_ray", command, str(path)], env=head.environment, stderr=subprocess.PIPE, text=True
    )
    try:
        while process.poll() is None and time.monotonic() - began < LIMIT_S:
            if first is None and any(last_step(each) for each in (run_dir, *run_dir.glob("trials/*"))):
                first = time.monotonic() - began
            time.sleep(0.2)
        assert process.poll() is not None, f"{command} took more than {LIMIT_S} s"
    finally:
        process.kill()
    _, said = process.communicate()
    assert process.returncode == exit_code, said
    return first, said


def wait_for_nodes(head: Head, count: int) -> None:
    """Wait until idle nodes have gone, so that there are so many, the head included."""
    began = time.monotonic()
    wait_until(lambda: head.num_nodes() == count, "the end of idle nodes", 60 * IDLE_MINUTES + 100)
    print(f"idle nodes gone {time.monotonic() - began:.0f} s after the command (limit: {60 * IDLE_MINUTES:.0f} s idle)")


SCALING = {"cpus_per_worker": 1.6, "nodes_timeout_s": 600, "gpus_per_worker": 0}
OPTIM = LONG | {"adam_epsilon": 1e-4, "schedule": "constant"}


@pytest.mark.timeout(3600)
def test_nodes_come_for_a_run_and_for_a_sweep_and_go_when_they_are_idle(tmp_path: Path) -> None:
    data = {"train": str(write_pairs(tmp_path / "data", 40))}
    two = tiny_recipe(tmp_path, "two", data=data, optim=OPTIM, scaling=SCALING | {"num_workers": 2})
    search = tiny_recipe(
        tmp_path, "sweep", data=data | {"eval_fraction": 0.2}, optim=OPTIM, scaling=SCALING | {"num_workers": 1},
        tune={"num_trials": 2, "max_concurrent": 2},
    )  # fmt: skip
    with autoscaling_head(tmp_path, max_nodes=2) as head:
        seconds, _ = orpo_ray_on(head, "train", two, tmp_path)
        print(f"first step of two workers, whose nodes had to come, after {seconds:.0f} s")
        wait_for_nodes(head, 1)
        assert head.num_nodes(ever=True) == 1 + 2
        seconds, _ = orpo_ray_on(head, "tune", search, tmp_path)
        print(f"first step of a sweep, whose nodes had to come, after {seconds:.0f} s")
        assert len(list((Path(search.run_uri) / "trials").iterdir())) == 2
        wait_for_nodes(head, 1)
        assert head.num_nodes(ever=True) == 1 + 2 + 2  # a node for each of the two trials at a time


@pytest.mark.timeout(900)
def test_a_run_that_no_pool_can_hold_is_told_so_soon_and_ends(tmp_path: Path) -> None:
    data = {"train": str(write_pairs(tmp_path / "data", 40))}
    scaling = SCALING | {"num_workers": 3, "nodes_timeout_s": 90}  # two nodes at most, with room for one worker each
    with autoscaling_head(tmp_path, max_nodes=2) as head:
        _, said = orpo_ray_on(head, "train", tiny_recipe(tmp_path, "never", data=data, scaling=scaling), tmp_path, 2)
        assert head.num_nodes(ever=True) == 1
        command = [sys.executable, "-m", "orpo_ray", "doctor", "--json"]
        doctor = subprocess.run(command, env=head.environment, capture_output=True, text=True, check=False)
    found = {each["check"]: each for each in json.loads(doctor.stdout)}
    assert found["node pools"]["status"] == "warning"
    assert "1 node(s) looked at; pools without nodes are not checked" in found["node pools"]["value"]
    warning, error = (said.index(each) for each in ("warning: the autoscaler can start", "the cluster has no room"))
    assert warning < error, said
    assert "no nodes for 3 worker(s) with 1.6 CPU(s) each: no pool has such nodes, or its nodes are taken" in said
    assert "for 3 worker(s) with 1.6 CPU(s) each, and has started no nodes for them within 90 s; it has 1 node" in said
    assert "Traceback" not in said


@pytest.mark.timeout(3600)
def test_a_run_starts_on_one_node_and_takes_the_second_when_it_comes(ray_cluster: None, tmp_path: Path) -> None:
    data = {"train": str(write_pairs(tmp_path / "data", 40))}
    slow = data | {"format": "support.slow_rows:in_turn"}
    some = tiny_recipe(
        tmp_path, "some", data=slow, optim=OPTIM | {"max_steps": 100},
        scaling=SCALING | {"num_workers": [1, 2], "resize_interval_s": 2},
    )  # fmt: skip
    with autoscaling_head(tmp_path, max_nodes=2, min_nodes=1) as head:
        first, _ = orpo_ray_on(head, "train", some, tmp_path)
        workers = workers_by_step(some)
        assert (workers[1], workers[100]) == (1, 2)
        second = min(step for step, count in workers.items() if count == 2)
        print(f"first step after {first:.0f} s; two workers from step {second}")
        wait_for_nodes(head, 2)
    alone = tiny_recipe(tmp_path, "alone", data=data, optim=OPTIM | {"max_steps": 100})
    run(alone)
    assert losses(Path(some.run_uri)) == pytest.approx(losses(Path(alone.run_uri)), abs=1e-4)
