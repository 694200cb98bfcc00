"""Runs whose number of workers changes with the nodes of the cluster, which are real raylets on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.recipe import Recipe
from support.clusters import NODE, cluster_of, drain, training_on, workers_by_step
from support.paths import ROOT
from support.runs import last_step, wait_until
from support.tiny_runs import losses, tiny_recipe

STARTED = 240  # seconds that starting workers may take while other tests run


@pytest.fixture(autouse=True)
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of a cluster import `support.slow_rows`."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))


def elastic_recipe(storage: Path, name: str, adapter: str = "slowly", **scaling: Any) -> Recipe:
    """Return a recipe that lasts until it is stopped, with losses that do not depend on its length."""
    return tiny_recipe(
        storage,
        name,
        data={"format": f"support.slow_rows:{adapter}"},
        optim={"max_steps": 5000, "epochs": 1000, "schedule": "constant"},
        # A node has three CPUs: one worker, and room for the data.
        scaling={"num_workers": [1, 2], "cpus_per_worker": 1.6, "resize_interval_s": 2, **scaling},
    )


def wait_for_workers(recipe: Recipe, process: subprocess.Popen[str], count: int, since: int) -> int:
    """Wait for three steps with a number of workers, after a step; returns the last one."""

    def steps() -> list[int]:
        assert process.poll() is None, process.stderr and process.stderr.read()
        return [step for step, workers in workers_by_step(recipe).items() if workers == count and step > since]

    wait_until((Path(recipe.run_uri) / "metrics.jsonl").exists, "the run's first step", STARTED)
    wait_until(lambda: len(steps()) >= 3, f"three steps with {count} worker(s)", STARTED)
    return max(steps())


def stop(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    return err


def check_curve(cluster: Any, recipe: Recipe, folder: Path) -> None:
    """Compare the losses of a run with those of one that one worker makes without interruption."""
    curve = losses(Path(recipe.run_uri))
    assert sorted(curve) == list(range(1, len(curve) + 1))
    alone = elastic_recipe(folder, "alone", "quickly", num_workers=1)
    with training_on(cluster, alone, folder) as process:
        wait_until(lambda: last_step(Path(alone.run_uri)) >= len(curve), "the reference", STARTED)
        stop(process)
    expected = losses(Path(alone.run_uri))
    assert curve == pytest.approx({step: expected[step] for step in curve}, abs=1e-4)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_run_takes_a_node_that_comes_and_goes_on_without_one_that_goes(tmp_path: Path, stage: int) -> None:
    with cluster_of(1) as cluster:
        recipe = elastic_recipe(tmp_path, "elastic")
        recipe = recipe.model_copy(update={"deepspeed": recipe.deepspeed.model_copy(update={"zero_stage": stage})})
        with training_on(cluster, recipe, tmp_path) as process:
            step = wait_for_workers(recipe, process, 1, 0)
            node = cluster.add_node(**NODE)
            step = wait_for_workers(recipe, process, 2, step)
            cluster.remove_node(node, allow_graceful=False)
            wait_for_workers(recipe, process, 1, step)
            stop(process)
        check_curve(cluster, recipe, tmp_path)


@pytest.mark.timeout(900)
def test_a_preempted_node_costs_no_step_and_no_failure(tmp_path: Path) -> None:
    with cluster_of(2) as cluster:
        recipe = elastic_recipe(tmp_path, "preempted", max_failures=0)
        folder = Path(recipe.run_uri)
        with training_on(cluster, recipe, tmp_path) as process:
            step = wait_for_workers(recipe, process, 2, 0)
            node = next(node for node in cluster.worker_nodes)
            drain(cluster, node, 30)
            wait_until(lambda: any(folder.glob("checkpoint_*/manifest-00000.json")), "the checkpoint at the notice", 29)
            wait_until(lambda: len(list(folder.glob("checkpoint_*/manifest-00000.json"))) > 1, "that at the end", 60)
            before = last_step(folder)
            cluster.remove_node(node, allow_graceful=False)
            wait_for_workers(recipe, process, 1, step)
            first = min(step for step, workers in workers_by_step(recipe).items() if workers == 1)
            assert before - 1 <= first - 1 <= before + 1
            err = stop(process)
        assert "1 node(s) with 1 worker(s) will be taken away in" in err
        check_curve(cluster, recipe, tmp_path)
