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


@dataclass(frozen=True)
class Dashboard:
    """The dashboard, seen from the head node."""

    address: str | None
    """`host:port`; None if there is none."""
    listens_on: Sequence[str] = field(default=())
    """Addresses of the head node."""
    is_open: bool = False
    """Whether it lists jobs without a token."""


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
    shown = ", ".join(dashboard.listens_on) or dashboard.address
    is_local = all(each.startswith("127.") or each == "::1" for each in dashboard.listens_on)
    findings = []
    if not is_local:
        how = "start the head with --dashboard-host=127.0.0.1, and reach it through a tunnel"
        status: Status = "fix" if dashboard.is_open else "warning"
        findings.append(Finding("dashboard address", status, f"listens on {shown}", how))
    else:
        findings.append(fine("dashboard address", f"listens on {shown} only"))
    if dashboard.is_open:
        status = "warning" if is_local else "fix"
        said = "none: whoever reaches a port of Ray can run code on the cluster"
        findings.append(Finding("token", status, said, "start Ray with RAY_AUTH_MODE=token on all nodes"))
    else:
        findings.append(fine("token", "is asked for"))
    return findings


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


def check_gloo(errors: Mapping[str, str | None]) -> list[Finding]:
    """Check what the nodes said after they met over gloo."""
    failed = {node: error for node, error in errors.items() if error is not None}
    if failed:
        node, error = next(iter(failed.items()))
        fix = "open all ports between the nodes, and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to their interface"
        return [Finding("gloo between nodes", "fix", f"{node}: {error}", fix)]
    return [fine("gloo between nodes", f"{len(errors)} nodes added up a number")]
