"""A Ray cluster of several nodes on this machine, and commands that train on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.config.recipe import Recipe
from orpo_ray.tracking.jsonl import read_jsonl

NODE = {"num_cpus": 3, "object_store_memory": 150 << 20}


@contextmanager
def cluster_of(num_nodes: int) -> Iterator[Any]:
    """Start real raylets, each with three CPUs, and end them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        for _ in range(num_nodes - 1):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def training_on(cluster: Any, recipe: Recipe, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `orpo-ray train` on a cluster, and end it."""
    path = folder / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    # Without the settings of the Ray that this process may have started.
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "orpo_ray", "train", str(path)],
        env=own | {"RAY_ADDRESS": cluster.address},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def drain(cluster: Any, node: Any, seconds: int) -> None:
    """Announce that a node will be taken away, as a cloud's spot service does by way of Ray's autoscaler."""
    options = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
    subprocess.run(
        [Path(sys.executable).with_name("ray"), "drain-node", "--address", cluster.address, "--node-id", node.node_id,
         *options, "--deadline-remaining-seconds", str(seconds)],
        check=True, capture_output=True,
    )  # fmt: skip


def workers_by_step(recipe: Recipe) -> dict[int, int]:
    """Return the number of workers that made each step of an elastic run."""
    lines = read_jsonl(Path(recipe.run_uri) / "metrics.jsonl")
    return {line["step"]: line["train/num_workers"] for line in lines if "train/num_workers" in line}
