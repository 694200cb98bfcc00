"""A run that loses a node with a worker, then its driver, then its whole cluster."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from orpo_ray.config.recipe import Recipe
from support.clusters import cluster_of, is_on, lose_node, room_kept_for, training_on
from support.elastic_runs import STARTED, check_curve, elastic_recipe, stop
from support.paths import TESTS
from support.runs import last_step, wait_until


def wait_for_new_steps(recipe: Recipe, process: subprocess.Popen[str]) -> None:
    """Wait for three steps more than there are."""
    folder = Path(recipe.run_uri)
    before = last_step(folder)

    def has_more() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read()
        return last_step(folder) >= before + 3

    wait_until(has_more, f"steps after {before}", STARTED)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_run_outlives_a_node_its_driver_and_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    recipe = elastic_recipe(tmp_path, "lost", num_workers=2, max_failures=1)
    recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"every_steps": 5})})
    with cluster_of(3) as cluster:
        with training_on(cluster, recipe, tmp_path) as process:
            wait_for_new_steps(recipe, process)
            # The actor that all workers report to is where the driver is, so the loss of another node leaves it alone.
            assert is_on(cluster, cluster.head_node, "RunStatus")
            lose_node(cluster, next(node for node in cluster.worker_nodes if is_on(cluster, node, "RayTrainWorker")))
            wait_for_new_steps(recipe, process)
            process.kill()
        dead = json.loads((Path(recipe.run_uri) / "lease.json").read_text())["id"]
        assert room_kept_for(cluster, dead) != "{}"
        with training_on(cluster, recipe, tmp_path) as process:
            wait_for_new_steps(recipe, process)
            assert room_kept_for(cluster, dead) == "{}"
            cluster.shutdown()
            _, err = process.communicate(timeout=STARTED)
            assert process.returncode != 0, err
    with cluster_of(1) as cluster:
        alone = recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update={"num_workers": 1})})
        with training_on(cluster, alone, tmp_path) as process:
            wait_for_new_steps(alone, process)
            stop(process)
        check_curve(cluster, recipe, tmp_path)
