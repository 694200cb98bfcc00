"""A Ray head whose autoscaler starts nodes on this machine, with Ray's provider for that."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orpo_ray.ray_cluster.new_ray import unused_ports
from support.clusters import NODE
from support.local_head import running_ray
from support.runs import wait_until

IDLE_MINUTES = 0.2
STARTED = 120  # seconds
PROVIDER = "support.late_nodes.LateNodes"
EMPTY: dict[str, Any] = {
    "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [],
    "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
    "worker_start_ray_commands": [], "rsync_exclude": [], "rsync_filter": [], "file_mounts_sync_continuously": False,
}  # fmt: skip


class Head:
    """A head, and the nodes that it has started."""

    def __init__(self, address: str, environment: dict[str, str]) -> None:
        self.environment = environment | {"RAY_ADDRESS": address}

    def num_nodes(self, ever: bool = False) -> int:
        """Return how many nodes live, or have ever lived, the head included."""
        counted = "len(ray.nodes())" if ever else "sum(node['Alive'] for node in ray.nodes())"
        command = [sys.executable, "-c", f"import ray; ray.init(logging_level='error'); print({counted})"]
        done = subprocess.run(command, env=self.environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[0])  # Ray prints advice after it


@contextmanager
def autoscaling_head(folder: Path, max_nodes: int, min_nodes: int = 0) -> Iterator[Head]:
    """Start a head with one CPU, and end it with its nodes.

    Args:
        folder: for the configuration and the log.
        max_nodes: that the autoscaler may start, each with the CPUs of `support.clusters.NODE`.
        min_nodes: that it starts at once, and keeps.
    """
    from ray._private.services import get_node_ip_address
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    address = f"{get_node_ip_address()}:{unused_ports(1)[0]}"
    provider = {
        "type": "external", "module": PROVIDER, "gcs_address": address, "head_node_id": FAKE_HEAD_NODE_ID,
        "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True,
        "launch_multiple": True,
    }  # fmt: skip
    worker = {"CPU": NODE["num_cpus"], "object_store_memory": NODE["object_store_memory"]}
    config = EMPTY | {
        "cluster_name": "test", "max_workers": max_nodes, "upscaling_speed": 1.0, "idle_timeout_minutes": IDLE_MINUTES,
        "provider": provider, "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "pool": {"resources": worker, "node_config": {}, "min_workers": min_nodes, "max_workers": max_nodes},
        },
    }  # fmt: skip
    path, said = folder / "autoscaling.json", folder / "head.out"
    path.write_text(json.dumps(config))
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    settings = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    port = address.rpartition(":")[2]
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
        f"--autoscaling-config={path}", "--include-dashboard=false",
        f"--object-store-memory={NODE['object_store_memory']}",
    ]  # fmt: skip
    with running_ray(command, own | settings, said):
        found = Head(address, own)
        wait_until(lambda: found.num_nodes() == 1 + min_nodes, "the first nodes", STARTED)
        yield found
