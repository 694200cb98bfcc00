"""The CPUs and GPUs that Ray keeps for a run: given back when a run ends in whatever way.

Ray's AutoscalingCoordinator outlives a run. It keeps the room of one that was killed for three minutes, in which a run
with a range of workers finds none.
"""

from __future__ import annotations

import ray

_COORDINATOR = "AutoscalingCoordinator"  # name and namespace


def give_back(run_id: str) -> None:
    """Cancel what the coordinator keeps for a run, if anything.

    Args:
        run_id: the run's id in Ray Train.
    """
    try:
        coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
    except ValueError:  # no run has asked for room yet
        return
    coordinator.cancel_request.remote(f"train-{run_id}")
