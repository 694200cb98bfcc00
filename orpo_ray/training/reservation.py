"""The CPUs and GPUs that Ray keeps for a run: given back when a run ends in whatever way.

Ray's AutoscalingCoordinator outlives a run. It keeps the room of one that was killed for three minutes, in which a run
with a range of workers finds none. Placement groups outlive the actor that made them until its driver ends.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._private import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

from orpo_ray.data.reading import pipeline_of

_COORDINATOR = "AutoscalingCoordinator"  # name and namespace


def give_back(run_id: str, run_uri: str) -> None:
    """Cancel what the coordinator keeps for a run and for the reading of its data, if anything.

    Otherwise, nodes that an autoscaling cluster has started for the data would stay for these three minutes.

    Args:
        run_id: the run's id in Ray Train.
        run_uri: the run folder.
    """
    try:
        coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
    except (ValueError, ray.exceptions.RayError):  # no run has asked for room yet, or the cluster is lost
        return
    # The name that Ray Data gives to the first execution of a dataset.
    for name in (f"train-{run_id}", f"data-dataset_{pipeline_of(run_uri)}_0"):
        coordinator.cancel_request.remote(name)


def remove_groups(actor: Any) -> None:
    """Remove the placement groups that an actor has made, also those that wait for room.

    Args:
        actor: the handle of a dead actor.
    """
    accessor = state.state._connect_and_get_accessor()
    for raw in accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(raw)
        if group.creator_actor_id == actor._actor_id.binary() and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
