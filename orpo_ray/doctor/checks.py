"""Judge what the nodes say about themselves. No function here talks to a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.doctor.finding import Finding, Status, fine
from orpo_ray.errors import some_of

GIB, MIB = 2**30, 2**20
MAX_SKEW = 5.0  # seconds; object stores refuse requests from clocks that are off by minutes
# Pixels of a photograph, as `streaming/pipeline.py` has them: 40 MB for a task batch of 32 pairs.
PAIR_BYTES = 40e6 / 32
# CUDA -> the oldest driver on which programs for any of its minor versions run, says NVIDIA
# (https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
OLDEST_DRIVERS = {12: 525, 13: 580}
TASK_BATCHES = 2  # that Ray holds for each encoder: the one that is made, and the one that is read


@dataclass(frozen=True)
class Node:
    """A node, as Ray lists it and as its probe sees it."""

    name: str
    """Its address, and its host if that is another."""
    resources: Mapping[str, float]
    """Ray's resources."""
    facts: Mapping[str, Any]
    """What `NodeProbe.facts` returned."""
    skew: float = 0.0
    """Seconds that its clock is ahead of the driver's."""
    skew_error: float = 0.0
    """Seconds by which `skew` may be wrong."""
    problem: str | None = None
    """Why the node could not be looked at."""
    node_id: str = ""
    """Ray's id of the node."""


@dataclass(frozen=True)
class Dashboard:
    """The dashboard, seen from the head node."""

    address: str | None
    """`host:port`; None if there is none."""
    listens_on: Sequence[str] = field(default=())
    """Addresses of the head node."""
    is_open: bool | None = None
    """Whether it lists jobs without a token; None if it could not be asked."""
    in_pod: bool = False
    """Whether the head node is a pod of Kubernetes."""


def check_nodes(nodes: Sequence[Node]) -> list[Finding]:
    """Check that every node could be looked at."""
    lost = [node for node in nodes if node.problem is not None]
    if lost:
        said = "; ".join(f"{node.name}: {node.problem}" for node in lost)
        return [Finding("nodes", "fix", said, "see the raylet's log on that node, and `ray status`")]
    return [fine("nodes", f"{len(nodes)}: {some_of([node.name for node in nodes])}")]


def check_versions(nodes: Sequence[Node], own: Mapping[str, str | None]) -> list[Finding]:
    """Check that all nodes have orpo-ray, and the same versions as the driver.

    Args:
        nodes: all nodes.
        own: versions of the driver, `orpo-ray` included.
    """
    findings = []
    for name, expected in own.items():
        found = {
            node.name: node.facts["orpo_ray"] if name == "orpo-ray" else node.facts["versions"][name] for node in nodes
        }
        others = {node: version for node, version in found.items() if version != expected}
        if not others:
            findings.append(fine(f"version of {name}", expected or "not installed"))
            continue
        said = ", ".join(f"{version or 'missing'} on {node}" for node, version in others.items())
        fix = f"install {name} {expected} there, use one image on all nodes, or submit with a runtime environment"
        findings.append(Finding(f"version of {name}", "fix", f"{expected} here, {said}", fix))
    return findings


def check_gpus(nodes: Sequence[Node]) -> list[Finding]:
    """Check that Ray's GPUs are there, and that all drivers have the same version."""
    with_gpus = [node for node in nodes if node.resources.get("GPU", 0) > 0]
    if not with_gpus:
        return [fine("GPUs", "none in this cluster")]
    findings = []
    blind = [node.name for node in with_gpus if not node.facts["gpus"]]
    if blind:
        fix = "install NVIDIA's driver there; in a container, its runtime must pass the GPUs on"
        findings.append(Finding("GPUs", "fix", f"Ray has GPUs on {some_of(blind)}, and nvidia-smi shows none", fix))
    else:
        names = sorted({gpu["name"] for node in with_gpus for gpu in node.facts["gpus"]})
        count = sum(node.resources["GPU"] for node in with_gpus)
        findings.append(fine("GPUs", f"{count:g} on {len(with_gpus)} node(s): {some_of(names)}"))
    drivers = {gpu["driver"]: node.name for node in with_gpus for gpu in node.facts["gpus"] or ()}
    said = ", ".join(f"{version} on {node}" for version, node in drivers.items())
    if len(drivers) > 1:
        findings.append(Finding("GPU driver", "warning", said, "use one version on all nodes"))
    elif drivers:
        findings.append(fine("GPU driver", next(iter(drivers))))
    return findings


def check_cuda(nodes: Sequence[Node]) -> list[Finding]:
    """Check that torch is built for CUDA where GPUs are, and that the drivers are new enough for it."""
    with_gpus = [node for node in nodes if node.resources.get("GPU", 0) > 0 and node.facts["gpus"]]
    with_torch = [node for node in with_gpus if node.facts["versions"]["torch"] is not None]
    if not with_torch:
        return []
    without = [node.name for node in with_torch if node.facts["torch_cuda"] is None]
    if without:
        said = f"torch is built without CUDA on {some_of(without)}"
        return [Finding("CUDA of torch", "fix", said, "install torch's build for CUDA there")]
    old, unknown = [], []
    for node in with_torch:
        cuda = node.facts["torch_cuda"]
        oldest = OLDEST_DRIVERS.get(int(cuda.partition(".")[0]))
        for driver in sorted({gpu["driver"] for gpu in node.facts["gpus"]}):
            if oldest is None:
                unknown.append(f"CUDA {cuda} with driver {driver} on {node.name}")
            elif int(driver.partition(".")[0]) < oldest:
                old.append(f"CUDA {cuda} needs driver {oldest} or newer, and {node.name} has {driver}")
    if old:
        fix = "install a newer driver there, or a torch that is built for an older CUDA"
        return [Finding("CUDA of torch", "fix", some_of(old), fix)]
    if unknown:
        fix = "look up in NVIDIA's release notes which driver this CUDA needs"
        return [Finding("CUDA of torch", "warning", f"not compared: {some_of(unknown)}", fix)]
    versions = sorted({node.facts["torch_cuda"] for node in with_torch})
    return [fine("CUDA of torch", f"{some_of(versions)}, for which the drivers are new enough")]


def check_pools(nodes: Sequence[Node]) -> list[Finding]:
    """Say that the nodes which an autoscaler may still start could not be checked."""
    said = f"an autoscaler is active: {len(nodes)} node(s) looked at; pools without nodes are not checked"
    return [Finding("node pools", "warning", said, "check again while a run holds nodes of these pools")]


def check_clocks(nodes: Sequence[Node]) -> list[Finding]:
    """Check that all clocks agree with the driver's."""
    off = [node for node in nodes if abs(node.skew) - node.skew_error > MAX_SKEW]
    if off:
        said = ", ".join(f"{node.skew:+.1f} s on {node.name}" for node in off)
        return [Finding("clocks", "fix", said, "run an NTP client (chrony) on all nodes")]
    most = max((abs(node.skew) for node in nodes), default=0.0)
    return [fine("clocks", f"at most {most:.2f} s apart")]


def store_bytes_needed(pairs_per_step: int, cpus: float) -> float:
    """Return the bytes of encoded pairs that a node's object store should hold, for photographs.

    Args:
        pairs_per_step: of the recipe.
        cpus: of the node, which limit how many tasks encode there at a time.
    """
    encoders = max(1.0, cpus)
    return PAIR_BYTES * (32 * TASK_BATCHES * min(encoders, 8.0) + 2 * pairs_per_step)


def check_object_stores(nodes: Sequence[Node], pairs_per_step: int | None) -> list[Finding]:
    """Check that object stores fit into shared memory, and that a recipe's pairs fit into them.

    Args:
        nodes: all nodes.
        pairs_per_step: of the recipe, if there is one.
    """
    findings = []
    small, slow = [], []
    for node in nodes:
        store = node.resources.get("object_store_memory", 0.0)
        needed = 0.0 if pairs_per_step is None else store_bytes_needed(pairs_per_step, node.resources.get("CPU", 0.0))
        if store < needed:
            small.append(f"{store / MIB:,.0f} MiB on {node.name}, and {needed / MIB:,.0f} MiB are needed")
        if node.facts["shared_memory"] < store:
            slow.append(
                f"{node.facts['shared_memory'] / MIB:,.0f} MiB for a store of {store / MIB:,.0f} MiB on {node.name}"
            )
    least = min((node.resources.get("object_store_memory", 0.0) for node in nodes), default=0.0)
    if small:
        fix = "start Ray there with --object-store-memory, or on a machine with more memory"
        findings.append(Finding("object store", "fix", some_of(small), fix))
    else:
        findings.append(fine("object store", f"at least {least / MIB:,.0f} MiB per node"))
    if slow:
        fix = "give the container more shared memory (docker --shm-size; on Kubernetes an emptyDir in memory)"
        findings.append(Finding("shared memory", "fix", some_of(slow), fix))
    else:
        findings.append(fine("shared memory", "holds the object store of every node"))
    return findings


def check_dashboard(dashboard: Dashboard) -> list[Finding]:
    """Check who can reach the dashboard, which runs any code that it is sent."""
    if dashboard.address is None:
        fix = "start Ray with --include-dashboard=true; jobs are submitted through it"
        return [Finding("dashboard", "warning", "there is none", fix)]
    return [_check_address(dashboard), _check_token(dashboard)]


def _check_address(dashboard: Dashboard) -> Finding:
    name = "dashboard address"
    if not dashboard.listens_on:
        said = f"{dashboard.address}; the head node does not show on which addresses it listens"
        return Finding(name, "warning", said, "run `ss -ltn` on the head node")
    shown = ", ".join(dashboard.listens_on)
    if _is_local(dashboard):
        return fine(name, f"listens on {shown} only")
    fix = "start the head with --dashboard-host=127.0.0.1, and reach it through a tunnel"
    if dashboard.in_pod:  # KubeRay's operator and the service must reach it
        fix = "let a network policy admit the cluster's own pods only, as cluster/kuberay/network-policy.yaml does"
    return Finding(name, "fix" if dashboard.is_open else "warning", f"listens on {shown}", fix)


def _check_token(dashboard: Dashboard) -> Finding:
    if dashboard.is_open is None:
        said = f"not checked: the dashboard at {dashboard.address} does not answer here"
        return Finding("token", "warning", said, "run `orpo-ray doctor` on the head node")
    if not dashboard.is_open:
        return fine("token", "is asked for")
    said = "none: whoever reaches a port of Ray can run code on the cluster"
    status: Status = "warning" if dashboard.listens_on and _is_local(dashboard) else "fix"
    return Finding("token", status, said, "start Ray with RAY_AUTH_MODE=token on all nodes")


def _is_local(dashboard: Dashboard) -> bool:
    return all(each.startswith("127.") or each == "::1" for each in dashboard.listens_on)


def check_storage(uri: str, errors: Mapping[str, str | None], seen: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Check that every node can write to the storage, and sees what the others wrote.

    Args:
        uri: folder or URI of the storage.
        errors: node -> what went wrong when it wrote or read.
        seen: node -> the nodes whose files it reads.
    """
    failed = {node: error for node, error in errors.items() if error is not None}
    if failed:
        said = "; ".join(f"{node}: {error}" for node, error in failed.items())
        return [
            Finding(
                "storage",
                "fix",
                f"{uri} cannot be written and read: {said}",
                "mount it there, or give the nodes access",
            )
        ]
    blind = {node: [each for each in errors if each not in others] for node, others in seen.items()}
    blind = {node: missing for node, missing in blind.items() if missing}
    if blind:
        node, missing = next(iter(blind.items()))
        said = f"{uri} is another folder on each node: {node} does not see the files of {some_of(missing)}"
        return [Finding("storage", "fix", said, "use a folder that all nodes mount, s3://... or gs://...")]
    return [fine("storage", f"{uri} is written and seen by {len(errors)} node(s)")]


def check_disk(where: str, free: Mapping[str, int | None], needed: float | None) -> list[Finding]:
    """Check the room for checkpoints.

    Args:
        where: the folder.
        free: node -> free bytes of the disk of that folder.
        needed: bytes; None if they are not known.
    """
    known = {node: bytes_free for node, bytes_free in free.items() if bytes_free is not None}
    if not known:
        return []
    least = min(known, key=lambda node: known[node])
    said = f"{known[least] / GIB:,.1f} GiB free in {where} on {least}"
    if needed is None:
        return [fine("disk", said)]
    said = f"{said}, and about {needed / GIB:,.2f} GiB are needed for checkpoints"
    if known[least] < needed:
        return [
            Finding("disk", "fix", said, "make room, or set checkpoint.storage or checkpoint.scratch to another disk")
        ]
    return [fine("disk", said)]


def check_torch(errors: Mapping[str, str]) -> list[Finding]:
    """Say on which nodes torch cannot be imported, of those that have the driver's version."""
    said = "; ".join(f"{node}: {error}" for node, error in errors.items())
    return [Finding("torch", "fix", f"cannot be imported: {said}", "run `python -c 'import torch'` there")]


def check_meeting(backend: str, errors: Mapping[str, str | None]) -> list[Finding]:
    """Check what the nodes said after they met.

    Args:
        backend: `gloo` or `NCCL`.
        errors: node -> what went wrong.
    """
    name = f"{backend} between nodes"
    failed = {node: error for node, error in errors.items() if error is not None}
    if failed:
        node, error = next(iter(failed.items()))
        fix = "open all ports between the nodes, and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to their interface"
        return [Finding(name, "fix", f"{node}: {error}", fix)]
    return [fine(name, f"{len(errors)} nodes added up a number")]


def nccl_not_tried(nodes: Sequence[Node]) -> Finding:
    """Say on which nodes all GPUs are taken."""
    said = f"not tried with {some_of([node.name for node in nodes])}, where no GPU is free"
    return Finding("NCCL between nodes", "warning", said, "check again when a GPU is free there")
