"""Ray's provider of nodes on this machine, with the time that a cloud takes to start one."""

from __future__ import annotations

import time
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

SECONDS = 45.0


class LateNodes(FakeMultiNodeProvider):  # type: ignore[misc]
    """Starts each node late."""

    def create_node_with_resources_and_labels(self, *arguments: Any, **options: Any) -> Any:
        """Wait, and start nodes."""
        time.sleep(SECONDS)
        return super().create_node_with_resources_and_labels(*arguments, **options)
