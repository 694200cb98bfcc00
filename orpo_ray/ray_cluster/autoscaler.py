"""What Ray's autoscaler reports about itself."""

from __future__ import annotations

import ray
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply


def autoscaling_state(seconds: float) -> AutoscalingState | None:
    """Return the last report of the autoscaler, or None if there is no answer now. Version 1 reports nothing here.

    Args:
        seconds: to wait for the answer.
    """
    reply = GetClusterStatusReply()
    try:
        client = ray._private.worker.global_worker.gcs_client
        reply.ParseFromString(client.get_cluster_status(timeout_s=seconds))
    except (ray.exceptions.RayError, RuntimeError, AttributeError, TypeError):  # also: another version of Ray answers
        return None
    return reply.autoscaling_state
