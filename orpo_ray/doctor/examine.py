"""Examine a cluster: an actor on each node looks around, writes to the storage, and meets the others."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import orpo_ray
from orpo_ray.config.recipe import Recipe
from orpo_ray.doctor import checks, probe
from orpo_ray.doctor.checks import Dashboard, Node
from orpo_ray.doctor.finding import Finding
from orpo_ray.doctor.probe import NodeProbe
from orpo_ray.errors import UserError
from orpo_ray.planning.imports import uncollected
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.files import is_remote

ANSWER_SECONDS = 60.0  # for a node to start the probe and to answer
IMPORT_SECONDS = 300.0  # for torch, which a node may read from a slow disk
MEET_SECONDS = 60.0
DASHBOARD_SECONDS = 5.0
CLOCK_LOOKS = 3


def examine(recipe: Recipe | None, address: str | None) -> list[Finding]:
    """Join a cluster and check it.

    Args:
        recipe: whose storage and sizes to check, if there is one.
        address: `host:port` of the cluster, or `auto` for the one that runs on this machine; by default, RAY_ADDRESS or
            `auto`.

    Raises:
        UserError: no cluster answers at the address, or it refuses the token.
    """
    if not ray.is_initialized():
        os.environ["RAY_ADDRESS"] = address or os.environ.get("RAY_ADDRESS") or "auto"
        start_ray()
    alive = [node for node in ray.nodes() if node["Alive"]]
    with _probes(alive) as probes:
        nodes = [_look(node, actor) for node, actor in zip(alive, probes, strict=True)]
        found = checks.check_nodes(nodes)
        seen = [(node, actor) for node, actor in zip(nodes, probes, strict=True) if node.problem is None]
        looked_at = [node for node, _ in seen]
        found += checks.check_versions(looked_at, own_versions())
        found += checks.check_gpus(looked_at)
        found += checks.check_clocks(looked_at)
        found += checks.check_object_stores(looked_at, recipe.optim.pairs_per_step if recipe else None)
        found += checks.check_dashboard(_dashboard(alive, nodes))
        found += _meet(seen)
        if recipe is not None:
            found += _storage(recipe, seen)
    return found


def own_versions() -> dict[str, str | None]:
    """Return the versions of this process."""
    own: dict[str, str | None] = {"orpo-ray": orpo_ray.__version__, "python": platform.python_version()}
    for name in probe.PACKAGES:
        own[name] = importlib.metadata.version(name)
    return own


@contextlib.contextmanager
def _probes(nodes: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """Start a probe on each node, sent by value, since a node may lack this package."""
    ray.cloudpickle.register_pickle_by_value(probe)
    remote = ray.remote(num_cpus=0, max_restarts=0)(NodeProbe)
    started = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in nodes
    ]
    try:
        yield started
    finally:
        ray.cloudpickle.unregister_pickle_by_value(probe)
        for actor in started:
            ray.kill(actor)


def _look(node: Mapping[str, Any], actor: Any) -> Node:
    name = str(node["NodeManagerAddress"])
    if node["NodeManagerPort"]:
        name += f":{node['NodeManagerPort']}"
    try:
        facts = ray.get(actor.facts.remote(), timeout=ANSWER_SECONDS)
        skew, error = min((_skew(actor) for _ in range(CLOCK_LOOKS)), key=lambda look: look[1])
    except (ray.exceptions.RayError, TimeoutError) as failure:
        return Node(name, node["Resources"], {}, problem=" ".join(str(failure).split())[:200])
    return Node(name, node["Resources"], facts, skew, error)


def _skew(actor: Any) -> tuple[float, float]:
    """Return how far a node's clock is ahead, and by how much that may be wrong, in seconds."""
    before = time.time()
    there = ray.get(actor.clock.remote(), timeout=ANSWER_SECONDS)
    after = time.time()
    return there - (before + after) / 2, (after - before) / 2


def _dashboard(alive: Sequence[Mapping[str, Any]], nodes: Sequence[Node]) -> Dashboard:
    address = ray._private.worker.global_worker.node.address_info.get("webui_url") or None
    if not address:
        return Dashboard(None)
    port = int(address.rpartition(":")[2])
    head = next(
        (node for raw, node in zip(alive, nodes, strict=True) if "node:__internal_head__" in raw["Resources"]), None
    )
    listens_on = head.facts.get("listening", {}).get(port, ()) if head is not None else ()
    return Dashboard(address, listens_on, _is_open(address))


def _is_open(address: str) -> bool:
    """Whether the dashboard lists jobs to somebody without a token."""
    try:
        with urllib.request.urlopen(f"http://{address}/api/jobs/", timeout=DASHBOARD_SECONDS) as answer:
            json.load(answer)
    except (OSError, ValueError):  # 401, or no answer from here
        return False
    return True


def _meet(nodes: Sequence[tuple[Node, Any]]) -> list[Finding]:
    """Have all nodes with this driver's torch meet over gloo."""
    version = own_versions()["torch"]
    able = [(node, actor) for node, actor in nodes if node.facts["versions"]["torch"] == version]
    if len(able) < 2:
        return []
    torch = _ask([actor.import_torch.remote() for _, actor in able], IMPORT_SECONDS)
    lost = {node.name: problem for (node, _), (_, problem) in zip(able, torch, strict=True) if problem}
    able = [pair for pair in able if pair[0].name not in lost]
    found = checks.check_torch(lost) if lost else []
    if len(able) < 2:
        return found
    first, actor_of_first = able[0]
    address = first.name.partition(":")[0]
    ((port, problem),) = _ask([actor_of_first.free_port.remote()], ANSWER_SECONDS)
    if problem is not None:
        return found + checks.check_gloo({first.name: problem})
    met = _ask(
        [actor.meet.remote(address, port, rank, len(able), MEET_SECONDS) for rank, (_, actor) in enumerate(able)],
        2 * MEET_SECONDS,
    )
    return found + checks.check_gloo(
        {node.name: problem or answer for (node, _), (answer, problem) in zip(able, met, strict=True)}
    )


def _ask(asked: Sequence[ray.ObjectRef], seconds: float) -> list[tuple[Any, str | None]]:
    """Wait for nodes. Return the answer of each, or None and why there is none, such as a disk that hangs."""
    ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
    found: list[tuple[Any, str | None]] = []
    for each in asked:
        try:
            found.append((ray.get(each, timeout=0), None))
        except ray.exceptions.GetTimeoutError:
            found.append((None, f"no answer within {seconds:.0f} s"))
        except ray.exceptions.RayTaskError as failure:
            found.append((None, " ".join(str(failure.cause).split())[:200]))
        except ray.exceptions.RayError as failure:
            found.append((None, " ".join(str(failure).split())[:200]))
    return found


def _storage(recipe: Recipe, nodes: Sequence[tuple[Node, Any]]) -> list[Finding]:
    """Write to the storage from every node, read what the others wrote, and look at the room for checkpoints."""
    storage = recipe.run_uri.removesuffix(f"/{recipe.name}")
    folder = f"{storage}/.orpo-ray-doctor-{uuid.uuid4().hex[:8]}"
    able = nodes if not is_remote(storage) else [pair for pair in nodes if pair[0].facts["orpo_ray"] is not None]
    names = {node.name: f"node-{index}" for index, (node, _) in enumerate(able)}
    existed = is_remote(storage) or os.path.isdir(storage)
    written = _ask([actor.write.remote(folder, names[node.name], node.name) for node, actor in able], ANSWER_SECONDS)
    errors = {node.name: problem or answer for (node, _), (answer, problem) in zip(able, written, strict=True)}
    # A node that did not answer still waits for its disk, and would cost the same time again.
    able = [pair for pair, (_, problem) in zip(able, written, strict=True) if problem is None]
    read = _ask([actor.read.remote(folder, list(names.values())) for _, actor in able], ANSWER_SECONDS)
    seen: dict[str, list[str]] = {}
    for (node, _), (answer, problem) in zip(able, read, strict=True):
        if problem is None:
            seen[node.name] = list(answer.values())
        else:
            errors[node.name] = problem
    able = [pair for pair in able if pair[0].name in seen]
    _ask([actor.remove.remote(folder, [] if existed else [storage]) for _, actor in able], ANSWER_SECONDS)
    found = checks.check_storage(storage, errors, seen)
    on_disk = recipe.checkpoint.scratch or "/tmp" if is_remote(storage) else storage
    room = _ask([actor.free_bytes.remote(on_disk) for _, actor in able], ANSWER_SECONDS)
    free = {node.name: answer for (node, _), (answer, problem) in zip(able, room, strict=True) if problem is None}
    kept = 1 if is_remote(storage) else recipe.checkpoint.keep + 1
    size = checkpoint_bytes(recipe)
    return found + checks.check_disk(on_disk, free, None if size is None else size * kept)


def checkpoint_bytes(recipe: Recipe) -> float | None:
    """Estimate the bytes of a checkpoint from the number of trained parameters; None if the model is unknown here."""
    with uncollected():
        from orpo_ray.planning.plan import Options, plan
        from orpo_ray.training.optimizer import state_bytes
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print
            model = plan(recipe, Options())["model"]
    except UserError:
        return None
    trained = int(model["trained"])
    # ZeRO 1 and 2 also save the trained weights. ZeRO 0 trains the float32 copies, and ZeRO 3 has no whole weights.
    whole = trained * (4 if model["dtype"] == "float32" else 2) if recipe.deepspeed.zero_stage in (1, 2) else 0
    return float(state_bytes(trained, recipe.optim) + whole)
