"""Hear of nodes that will be taken away soon, at the same step on all workers."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray.train
from ray.train import PreemptionInfo

LOOK_SECONDS = 2.0
"""Seconds between looks. Each is a call to an actor, for which all workers wait."""


class PreemptionNotice:
    """A worker's view of the announcements of nodes: by `ray start --block` at SIGTERM, or by `ray drain-node`.

    Args:
        rank: of this worker; rank 0 decides when all look.
        is_watched: whether Ray Train watches the nodes of the run.
    """

    def __init__(self, rank: int, is_watched: bool) -> None:
        self._rank, self._is_watched, self._looked = rank, is_watched, time.monotonic()
        self._known: PreemptionInfo | None = None
        self.is_looking = False
        """Whether all workers look after this step."""

    def is_due(self) -> bool:
        """Whether this worker wants all to look."""
        return self._is_watched and self._rank == 0 and time.monotonic() - self._looked >= LOOK_SECONDS

    def is_new(self, warn: Callable[[str], None]) -> bool:
        """Look, if all do, and return whether there is a notice that is not known yet. A collective then.

        Args:
            warn: takes a sentence about the notice, on rank 0.
        """
        if not self.is_looking:
            return False
        found = ray.train.get_preemption_info()
        self._looked = time.monotonic()
        is_new = found is not None and found != self._known
        self._known = found
        if is_new and self._rank == 0:
            warn(_sentence(found))
        return is_new


def _sentence(info: PreemptionInfo) -> str:
    lost = f"{len(info.preempted_node_ids)} node(s) with {len(info.preempted_ranks)} worker(s) will be taken away"
    when = "" if info.deadline_ms is None else f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
    return f"{lost}{when}; a checkpoint is saved now, and the run goes on until then"
