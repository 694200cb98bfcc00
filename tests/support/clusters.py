"""A Ray cluster of several nodes on this machine, and commands that train on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from orpo_ray.config.recipe import Recipe
from orpo_ray.fork_server.control import forked_workers
from orpo_ray.ray_cluster.new_ray import agents_expected
from orpo_ray.tracking.jsonl import read_jsonl
from support.local_head import running_ray
from support.runs import wait_until

NODE = {"num_cpus": 3, "object_store_memory": 150 << 20}
NODE_STARTS = 300  # seconds that nodes may take while other tests run
ATTEMPTS = 5  # to start a node
# If a Ray of this process has turned token authentication on, the nodes of a cluster ask for a token too.
TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def cluster_of(num_nodes: int) -> Iterator[Any]:
    """Start real raylets, each with three CPUs, and end them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        _start(cluster, include_dashboard=False)
        for _ in range(num_nodes - 1):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any) -> Any:
    """Start another raylet, and wait until the cluster knows of it."""
    node = _start(cluster, wait=False)
    wait_until(lambda: node.node_id in cluster.global_state._live_node_ids(), "the node", NODE_STARTS)
    return node


def _start(cluster: Any, **options: Any) -> Any:
    """Start a raylet. Ray gives one 30 seconds, which is too little while other tests run: try some more times."""
    for attempt in range(ATTEMPTS):
        before = set(psutil.Process().children())
        try:
            with agents_expected(is_alone=True), forked_workers():
                return cluster.add_node(**NODE, **options)
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == ATTEMPTS - 1:
                raise
            left = set(psutil.Process().children()) - before
            for process in left:
                process.kill()
            psutil.wait_procs(left)
    raise AssertionError


@contextmanager
def pod(cluster: Any, notice_s: int, folder: Path) -> Iterator[psutil.Popen]:
    """Start another raylet as KubeRay does in a worker pod, and end it.

    Args:
        cluster: the cluster.
        notice_s: how long the node announces that it will go, before it does.
        folder: for what the command prints.

    Yields:
        The pod's first process.
    """
    scripts = Path(sys.executable).parent
    start = (
        f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start --address={cluster.address} --block "
        f"--num-cpus={NODE['num_cpus']} --object-store-memory={NODE['object_store_memory']}"
    )
    environment = environment_of(cluster) | {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(notice_s), "PATH": f"{scripts}:{os.environ['PATH']}",
    }  # fmt: skip
    before = len(cluster.global_state._live_node_ids())
    with running_ray(["/bin/bash", "-c", "--", start], environment, folder / "pod") as process:
        wait_until(lambda: len(cluster.global_state._live_node_ids()) > before, "the pod's node", NODE_STARTS)
        yield process


def lose_node(cluster: Any, node: Any) -> None:
    """End a node's processes as the loss of a machine does."""
    cluster.remove_node(node, allow_graceful=False)


def processes(role: str) -> list[psutil.Process]:
    """Return the Ray processes of a role, `RayTrainWorker` or `RunStatus`, that this process has started."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE and has_role(child, role):
                found.append(child)
    return found


def has_role(process: psutil.Process, role: str) -> bool:
    """Say whether a process is an actor of this role. Raises psutil.Error if it has ended."""
    # An actor's process is called `ray::RunStatus.lines` while it answers a call.
    return "".join(process.cmdline()[:1]).partition(".")[0] == f"ray::{role}"


def is_on(cluster: Any, node: Any, role: str) -> bool:
    """Say whether an actor of this role lives on a node."""
    actors = cluster.global_state.actor_table(None, None, "ALIVE").values()
    return any(
        actor["ActorClassName"].endswith(role) and actor["Address"]["NodeID"] == node.node_id for actor in actors
    )


@contextmanager
def training_on(cluster: Any, recipe: Recipe, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `orpo-ray train` on a cluster, and end it."""
    process = start_training(cluster, recipe, folder)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def start_training(cluster: Any, recipe: Recipe, folder: Path) -> subprocess.Popen[str]:
    """Start `orpo-ray train` on a cluster."""
    path = folder / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-m", "orpo_ray", "train", str(path)],
        env=environment_of(cluster),
        stderr=subprocess.PIPE,
        text=True,
    )


def environment_of(cluster: Any) -> dict[str, str]:
    """Return the environment of a command that joins a cluster: without the settings of another Ray of this process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name in TOKEN}
    return own | {"RAY_ADDRESS": cluster.address}


def drain(cluster: Any, node: Any, seconds: int) -> None:
    """Announce that a node will be taken away."""
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


def room_kept_for(cluster: Any, run_id: str) -> str:
    """Return what Ray's AutoscalingCoordinator keeps for a run, as text; `{}` is nothing."""
    code = (
        "import ray, sys; ray.init(address='auto', logging_level='error');"
        "coordinator = ray.get_actor('AutoscalingCoordinator', namespace='AutoscalingCoordinator');"
        "print(ray.get(coordinator.get_reserved_resources.remote('train-' + sys.argv[1])))"
    )
    asked = subprocess.run(
        [sys.executable, "-c", code, run_id],
        env=environment_of(cluster), check=True, capture_output=True, text=True,
    )  # fmt: skip
    return asked.stdout.strip()
