"""Have nodes meet as the workers of a run do: over gloo between CPUs, and over NCCL between GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray._private.state import available_resources_per_node

from orpo_ray.doctor import checks
from orpo_ray.doctor.checks import Node
from orpo_ray.doctor.finding import Finding
from orpo_ray.doctor.probes import ask, probes

ANSWER_SECONDS = 60.0  # for a probe to start and to answer
IMPORT_SECONDS = 300.0  # for torch, which a node may read from a slow disk
MEET_SECONDS = 60.0
GPU_SHARE = 0.01  # of a GPU, for a probe: the GPU may also serve others that ask for less than the whole


def meet(nodes: Sequence[tuple[Node, Any]], torch: str | None) -> list[Finding]:
    """Have nodes meet over gloo, and those with a free GPU over NCCL.

    Args:
        nodes: each with its probe.
        torch: version of the driver. Nodes with another one do not take part.
    """
    able = [(node, actor) for node, actor in nodes if node.facts["versions"]["torch"] == torch]
    if len(able) < 2:
        return []
    able, found = _with_torch(able)
    found += _add_up("gloo", able)
    free, taken = with_free_gpu([node for node, _ in able], available_resources_per_node())
    if len(free) + len(taken) < 2:
        return found
    if taken:
        found.append(checks.nccl_not_tried(taken))
    if len(free) > 1:
        with probes([node.node_id for node in free], GPU_SHARE) as actors:
            able, lost = _with_torch(list(zip(free, actors, strict=True)))
            found += lost + _add_up("NCCL", able)
    return found


def with_free_gpu(nodes: Sequence[Node], available: Mapping[str, Mapping[str, float]]) -> tuple[list[Node], list[Node]]:
    """Return the nodes with a GPU that is free, and those whose GPUs are all taken.

    A probe must not wait for a GPU: an autoscaler would start a node for it.

    Args:
        nodes: all nodes. Those on which nvidia-smi shows no GPU are left out.
        available: id of a node -> its resources that are free.
    """
    with_gpus = [node for node in nodes if node.resources.get("GPU", 0.0) > 0 and node.facts["gpus"]]
    free = [node for node in with_gpus if available.get(node.node_id, {}).get("GPU", 0.0) >= GPU_SHARE]
    return free, [node for node in with_gpus if node not in free]


def _with_torch(nodes: list[tuple[Node, Any]]) -> tuple[list[tuple[Node, Any]], list[Finding]]:
    """Return the nodes that can import torch, and what there is to say about the others."""
    answers = ask([actor.import_torch.remote() for _, actor in nodes], IMPORT_SECONDS)
    lost = {node.name: problem for (node, _), (_, problem) in zip(nodes, answers, strict=True) if problem}
    return [pair for pair in nodes if pair[0].name not in lost], checks.check_torch(lost) if lost else []


def _add_up(backend: str, nodes: Sequence[tuple[Node, Any]]) -> list[Finding]:
    """Have nodes add up a number."""
    if len(nodes) < 2:
        return []
    first, actor_of_first = nodes[0]
    address = first.name.partition(":")[0]
    ((port, problem),) = ask([actor_of_first.free_port.remote()], ANSWER_SECONDS)
    if problem is not None:
        return checks.check_meeting(backend, {first.name: problem})
    met = ask(
        [
            actor.meet.remote(backend.lower(), address, port, rank, len(nodes), MEET_SECONDS)
            for rank, (_, actor) in enumerate(nodes)
        ],
        2 * MEET_SECONDS,
    )
    return checks.check_meeting(
        backend, {node.name: problem or answer for (node, _), (answer, problem) in zip(nodes, met, strict=True)}
    )
