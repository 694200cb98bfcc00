"""Which nodes the workers of a run may use, and what is said if there are none."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_ray.config.schema import ScalingConfig
from orpo_ray.errors import UserError
from orpo_ray.training.placement import fitting_nodes


def node(gpu: str | None = None, alive: bool = True, **labels: str) -> dict[str, Any]:
    resources = {"CPU": 8.0} | ({"GPU": 1.0, f"accelerator_type:{gpu}": 1.0} if gpu else {})
    return {"Alive": alive, "Resources": resources, "Labels": {"ray.io/node-id": "f", **labels}}


NODES = [node(), node("L4", market="spot"), node("L4"), node("H100", market="on-demand"), node("H100", alive=False)]


@pytest.mark.parametrize(
    ("scaling", "count"),
    [
        ({}, 4),
        ({"accelerator_type": "L4"}, 2),
        ({"labels": {"market": "spot"}}, 1),
        ({"labels": {"market": "!spot"}}, 3),
        ({"labels": {"market": "in(spot,on-demand)"}}, 2),
        ({"labels": {"market": "!in(spot,on-demand)"}}, 2),
        ({"labels": {"market": "spot"}, "accelerator_type": "H100", "nodes_timeout_s": 60}, 0),
    ],
)
def test_nodes_are_chosen_by_accelerator_and_labels(scaling: dict[str, Any], count: int) -> None:
    assert len(fitting_nodes(ScalingConfig(**scaling), NODES)) == count


def test_a_pool_that_is_not_there_is_said_with_what_is_there() -> None:
    with pytest.raises(UserError) as error:
        fitting_nodes(ScalingConfig(accelerator_type="A100", labels={"market": "spot"}), NODES)
    said = str(error.value)
    assert "no node of the cluster has an accelerator A100 and the label market: spot" in said
    assert "1 node(s) with 8 CPU(s), 1 GPU(s) (L4, market=spot)" in said
    assert "1 node(s) with 8 CPU(s), 0 GPU(s)" in said
    with pytest.raises(UserError, match=r"scaling\.labels"):
        fitting_nodes(ScalingConfig(labels={"market": "in(spot"}), NODES)
