"""Runs that ask a cluster for nodes which do not exist yet. The nodes are raylets of this machine."""

from __future__ import annotations

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
from support.runs import wait_until
from support.tiny_runs import LONG, losses, tiny_recipe, write_pairs

LIMIT_S = 400  # of a command


@pytest.fixture(autouse=True)
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of a cluster import `support.slow_rows`."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))


def orpo_ray_on(head: Head, command: str, recipe: Recipe, folder: Path) -> float:
    """Run a command to its end; return the seconds it took."""
    path = folder / f"{recipe.name}.yaml"
    path.write_text(recipe.to_yaml())
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "orpo_ray", command, str(path)],
        env=head.environment, capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return time.monotonic() - began


@pytest.mark.timeout(1800)
def test_nodes_come_for_a_run_and_for_a_sweep_and_go_when_they_are_idle(tmp_path: Path) -> None:
    data = {"train": str(write_pairs(tmp_path / "data", 40))}
    scaling = {"cpus_per_worker": 1.6, "nodes_timeout_s": 200, "gpus_per_worker": 0}
    optim = LONG | {"adam_epsilon": 1e-4, "schedule": "constant"}
    two = tiny_recipe(tmp_path, "two", data=data, optim=optim, scaling=scaling | {"num_workers": 2})
    slow = data | {"format": "support.slow_rows:in_turn"}
    some = tiny_recipe(
        tmp_path, "some", data=slow, optim=optim | {"max_steps": 100},
        scaling=scaling | {"num_workers": [1, 2], "resize_interval_s": 2},
    )  # fmt: skip
    search = tiny_recipe(
        tmp_path, "sweep", data=data | {"eval_fraction": 0.2}, optim=optim, scaling=scaling | {"num_workers": 1},
        tune={"num_trials": 2, "max_concurrent": 2},
    )  # fmt: skip
    with autoscaling_head(tmp_path, max_nodes=2) as head:

        def wait_until_idle_nodes_went() -> None:
            wait_until(lambda: head.num_nodes() == 1, "the end of idle nodes", 60 * IDLE_MINUTES + 100)

        assert head.num_nodes() == 1
        seconds = orpo_ray_on(head, "train", two, tmp_path)
        print(f"two workers on nodes that had to come: {seconds:.0f} s for {LONG['max_steps']} steps")
        wait_until_idle_nodes_went()
        orpo_ray_on(head, "train", some, tmp_path)
        assert workers_by_step(some)[100] == 2
        wait_until_idle_nodes_went()
        orpo_ray_on(head, "tune", search, tmp_path)
        assert len(list((Path(search.run_uri) / "trials").iterdir())) == 2
        wait_until_idle_nodes_went()
    curve = losses(Path(two.run_uri))
    assert {step: losses(Path(some.run_uri))[step] for step in curve} == pytest.approx(curve, abs=1e-4)
