"""How many workers a run starts with where their number may change: as many as the nodes have room for that stay.

Ray Train asks a coordinator that looks at the nodes every 20 seconds and counts those that are lost or announced to go.
Workers that are to start there wait for a minute, and such a start counts as a failure of the controller.

Nothing heavy is imported at the top: the controller imports this file.
"""

from __future__ import annotations

import socket
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2._internal.util import time_monotonic
from ray.train.v2.api.config import ScalingConfig

ANSWER_SECONDS = 1.0
"""That a node has to accept a connection."""


class StayingNodesPolicy(ElasticScalingPolicy):
    """Ray Train's policy, with a view of the nodes as they are now, and without those that are lost or leave.

    Args:
        scaling_config: Ray Train's, whose least and greatest numbers of workers are multiples of `together`.
        together: workers that compute the same pairs (`scaling.sequence_parallel`). They come and go as whole groups.
    """

    def __init__(self, scaling_config: ScalingConfig, together: int = 1) -> None:
        super().__init__(scaling_config)
        self._together = together
        self._latest_reserved_resources_query_time: float
        self._latest_reserved_resources: dict[str, Any] | None
        self._hosts: set[str] = set()
        """Nodes of the workers that run. They count until they are lost: a run goes on where it is announced to end."""

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Decide whether to change the number of workers."""
        self._hosts = {worker.metadata.node_id for worker in worker_group_state.workers}
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Decide how many workers to start."""
        self._hosts = set()
        return super().make_decision_for_non_running_worker_group()

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        """Count the workers that have room, without those that would fill a part of a group."""
        fitting: int = super()._count_possible_workers(reserved_resources)
        return fitting - fitting % self._together

    def _get_reserved_resources(self) -> dict[str, Any] | None:
        """Return what is reserved for the run on each node; None if the coordinator does not answer."""
        if time_monotonic() - self._latest_reserved_resources_query_time < self.GET_RESERVED_RESOURCES_INTERVAL_S:
            return self._latest_reserved_resources
        try:
            asked = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            reserved = ray.get(asked, timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S)
        except ray.exceptions.RayError:
            found = None
        else:
            stays = staying_nodes()
            found = {node: amounts for node, amounts in reserved.items() if node in self._hosts or node in stays}
        self._latest_reserved_resources_query_time = time_monotonic()
        self._latest_reserved_resources = found
        return found


def staying_nodes() -> set[str]:
    """Return the ids of the nodes that answer and are not announced to go.

    Ray takes a node for alive for some seconds after its machine is lost.
    """
    leaving = ray._private.state.state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return {node["NodeID"] for node in nodes if answers(node["NodeManagerAddress"], node["NodeManagerPort"])}


def answers(address: str, port: int) -> bool:
    """Whether a node accepts a connection to its raylet."""
    try:
        socket.create_connection((address, port), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
