"""Runs whose number of workers changes with the nodes of the cluster, which are real raylets on this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from support.clusters import add_node, cluster_of, drain, lose_node, pod, training_on, workers_by_step
from support.elastic_runs import check_curve, elastic_recipe, stop, wait_for_workers
from support.paths import TESTS
from support.runs import last_step, wait_until

NOTICE_SECONDS, ENDS_SECONDS = 60, 30
pytestmark = pytest.mark.nightly  # each is some starts of workers, which import everything anew on a cluster


@pytest.fixture(autouse=True)
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of a cluster import `support.slow_rows`."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_takes_a_node_that_comes_and_goes_on_without_one_that_goes(tmp_path: Path, stage: int) -> None:
    with cluster_of(1) as cluster:
        recipe = elastic_recipe(tmp_path, "elastic")
        recipe = recipe.model_copy(update={"deepspeed": recipe.deepspeed.model_copy(update={"zero_stage": stage})})
        with training_on(cluster, recipe, tmp_path) as process:
            step = wait_for_workers(recipe, process, 1, 0)
            node = add_node(cluster)
            step = wait_for_workers(recipe, process, 2, step)
            lose_node(cluster, node)
            wait_for_workers(recipe, process, 1, step)
            stop(process)
        check_curve(cluster, recipe, tmp_path)


@pytest.mark.timeout(1800)
def test_a_preempted_node_costs_no_step_and_no_failure(tmp_path: Path) -> None:
    with cluster_of(2) as cluster:
        recipe = elastic_recipe(tmp_path, "preempted", max_failures=0)
        folder = Path(recipe.run_uri)
        with training_on(cluster, recipe, tmp_path) as process:
            step = wait_for_workers(recipe, process, 2, 0)
            node = next(node for node in cluster.worker_nodes)
            drain(cluster, node, 60)
            wait_until(lambda: any(folder.glob("checkpoint_*/manifest-00000.json")), "the checkpoint at the notice", 59)
            wait_until(lambda: len(list(folder.glob("checkpoint_*/manifest-00000.json"))) > 1, "that at the end", 240)
            before = last_step(folder)
            lose_node(cluster, node)
            wait_for_workers(recipe, process, 1, step)
            first = min(step for step, workers in workers_by_step(recipe).items() if workers == 1)
            assert before - 1 <= first - 1 <= before + 1
            err = stop(process)
        assert "1 node(s) with 1 worker(s) will be taken away in" in err
        check_curve(cluster, recipe, tmp_path)


@pytest.mark.timeout(1800)
def test_a_pod_that_is_deleted_announces_it_and_costs_no_step_and_no_failure(tmp_path: Path) -> None:
    """SIGTERM to the first process of the pod, as Kubernetes sends it."""
    with cluster_of(1) as cluster, pod(cluster, NOTICE_SECONDS, tmp_path) as process:
        recipe = elastic_recipe(tmp_path, "deleted", max_failures=0)
        folder = Path(recipe.run_uri)
        with training_on(cluster, recipe, tmp_path) as training:
            step = wait_for_workers(recipe, training, 2, 0)
            process.send_signal(signal.SIGTERM)
            wait_until(
                lambda: any(folder.glob("checkpoint_*/manifest-00000.json")), "the checkpoint", NOTICE_SECONDS - 1
            )
            assert process.poll() is None  # the run has the node until the notice ends
            process.wait(NOTICE_SECONDS + ENDS_SECONDS)
            wait_for_workers(recipe, training, 1, step)
            err = stop(training)
        assert "1 node(s) with 1 worker(s) will be taken away in" in err
        check_curve(cluster, recipe, tmp_path)


@pytest.mark.timeout(600)
def test_a_pod_without_work_goes_at_once(tmp_path: Path) -> None:
    with cluster_of(1) as cluster, pod(cluster, NOTICE_SECONDS, tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        process.wait(NOTICE_SECONDS / 2)
