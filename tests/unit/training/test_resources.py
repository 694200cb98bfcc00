"""CPUs and GPUs of the workers of a run whose number of workers changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ray.train import ScalingConfig

from orpo_ray.errors import UserError
from orpo_ray.training.elastic import StayingNodesPolicy
from orpo_ray.training.resources import Resources, max_encoders, threads_of_worker, too_many_workers, worker_resources
from support.tiny_runs import tiny_recipe


def resources_of(tmp_path: Path, nodes: list[dict[str, float]], **scaling: Any) -> Resources:
    optim = scaling.pop("optim", {})
    recipe = tiny_recipe(tmp_path, "elastic", optim=optim, scaling={"num_workers": [1, 4], **scaling})
    cluster = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    return worker_resources(recipe, cluster, nodes=nodes)


def test_a_node_full_of_workers_leaves_cpus_for_the_data(tmp_path: Path) -> None:
    for cpus in (3, 4, 8, 16, 64, 3.5):
        found = resources_of(tmp_path, [{"CPU": cpus}], num_workers=[1, 64], optim={"pairs_per_step": 64})
        workers = cpus // found.cpus
        assert workers == max(1, math.ceil(cpus) - 2)
        assert cpus - workers * found.cpus >= 1
    assert resources_of(tmp_path, [{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2}]).cpus == 1
    assert resources_of(tmp_path, [{"CPU": 3}], cpus_per_worker=1.6).cpus == 1.6
    assert max_encoders(16, 1, 4) == 12


def test_workers_whose_nodes_are_to_come_ask_for_what_the_recipe_says(tmp_path: Path) -> None:
    nothing: list[dict[str, float]] = [{"CPU": 0.0}]
    waiting = {"nodes_timeout_s": 60, "num_workers": 2}
    assert resources_of(tmp_path, nothing, **waiting, gpus_per_worker=1).per_worker == {"CPU": 1, "GPU": 1}
    assert resources_of(tmp_path, nothing, **waiting, accelerator_type="L4").per_worker == {"CPU": 1, "GPU": 1}
    assert resources_of(tmp_path, nothing, **waiting, gpus_per_worker=0, cpus_per_worker=3).per_worker == {"CPU": 3}
    with pytest.raises(UserError, match="not known whether the run will have GPUs"):
        resources_of(tmp_path, nothing, **waiting)


@pytest.mark.parametrize(
    ("nodes", "scaling", "said"),
    [
        ([{"CPU": 2}], {}, "would leave no whole CPU on any node"),
        ([{"CPU": 2}], {"cpus_per_worker": 1.2}, "would leave no whole CPU on any node"),
        ([{"CPU": 1, "GPU": 1}], {}, "would leave no whole CPU on any node"),
        ([{"CPU": 2}], {"cpus_per_worker": 3}, "the cluster has room for 0 worker(s) with 3 CPU(s)"),
        ([{"CPU": 8, "GPU": 1}], {"num_workers": [2, 4]}, "2 worker(s) need 2 GPU(s), and the cluster has 1"),
        ([{"CPU": 8, "GPU": 1}], {"gpus_per_worker": 0.5}, "cannot share a GPU"),
    ],
)
def test_what_does_not_fit_is_said_before_the_start(
    tmp_path: Path, nodes: list[dict[str, float]], scaling: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as error:
        resources_of(tmp_path, nodes, **scaling)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("cpus", "together", "workers"), [((3, 2), 2, 4), ((3, 4), 3, 6), ((8, 8), 2, 8), ((1,), 2, 0)]
)
def test_workers_that_compute_together_come_and_go_as_whole_groups(
    cpus: tuple[int, ...], together: int, workers: int
) -> None:
    scaling = ScalingConfig(num_workers=(together, 8), resources_per_worker={"CPU": 1})
    nodes = {str(node): {"CPU": count} for node, count in enumerate(cpus)}
    assert StayingNodesPolicy(scaling, together)._count_possible_workers(nodes) == workers


def test_workers_that_share_cpus_are_named(tmp_path: Path) -> None:
    eight = tiny_recipe(tmp_path, "many", scaling={"num_workers": 8}, optim={"pairs_per_step": 8})
    assert too_many_workers(eight, {"CPU": 2}) == "8 workers share 2 CPU(s): they train slower than 1 worker(s) would"
    assert too_many_workers(eight, {"CPU": 8}) is None
    assert too_many_workers(eight, {"CPU": 4, "GPU": 8}) is None


@pytest.mark.parametrize(
    ("reserved", "share", "threads"), [(None, 16, 16), (None, 0, 1), (2, 16, 2), (1.6, 16, 1), (4, 2, 2)]
)
def test_a_worker_computes_with_the_cpus_that_it_reserves(
    tmp_path: Path, reserved: float | None, share: int, threads: int
) -> None:
    recipe = tiny_recipe(tmp_path, "few", scaling={"cpus_per_worker": reserved})
    assert threads_of_worker(recipe.scaling, share) == threads
