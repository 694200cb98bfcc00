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
from collections.abc import Mapping, Sequence
from typing import Any

import ray

import orpo_ray
from orpo_ray.config.recipe import Recipe
from orpo_ray.doctor import checks, probe
from orpo_ray.doctor.checks import Dashboard, Node
from orpo_ray.doctor.finding import Finding
from orpo_ray.doctor.meeting import ANSWER_SECONDS, meet
from orpo_ray.doctor.probes import ask, probes
from orpo_ray.errors import UserError
from orpo_ray.planning.imports import uncollected
from orpo_ray.ray_cluster.autoscaler import autoscaling_state
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.files import is_remote

DASHBOARD_SECONDS = 5.0
REFUSALS = (401, 403)  # HTTP's codes for no token and for another one
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
    with probes([node["NodeID"] for node in alive]) as actors:
        gcs_port = int(ray.get_runtime_context().gcs_address.rpartition(":")[2])
        nodes = [_look(node, actor, gcs_port) for node, actor in zip(alive, actors, strict=True)]
        head = next((node for node in nodes if "node:__internal_head__" in node.resources), None)
        found = checks.check_nodes(nodes)
        seen = [(node, actor) for node, actor in zip(nodes, actors, strict=True) if node.problem is None]
        looked_at = [node for node, _ in seen]
        if _starts_nodes(head):
            found += checks.check_pools(looked_at)
        found += checks.check_versions(looked_at, own_versions())
        found += checks.check_gpus(looked_at)
        found += checks.check_cuda(looked_at)
        found += checks.check_clocks(looked_at)
        found += checks.check_object_stores(looked_at, recipe.optim.pairs_per_step if recipe else None)
        found += checks.check_dashboard(_dashboard(head))
        found += meet(seen, own_versions()["torch"])
        if recipe is not None:
            found += _storage(recipe, seen)
    return found


def own_versions() -> dict[str, str | None]:
    """Return the versions of this process."""
    own: dict[str, str | None] = {"orpo-ray": orpo_ray.__version__, "python": platform.python_version()}
    for name in probe.PACKAGES:
        own[name] = importlib.metadata.version(name)
    return own


def _look(node: Mapping[str, Any], actor: Any, gcs_port: int) -> Node:
    name = str(node["NodeManagerAddress"])
    if node["NodeManagerPort"]:
        name += f":{node['NodeManagerPort']}"
    try:
        facts = ray.get(actor.facts.remote(gcs_port), timeout=ANSWER_SECONDS)
        skew, error = min((_skew(actor) for _ in range(CLOCK_LOOKS)), key=lambda look: look[1])
    except (ray.exceptions.RayError, TimeoutError) as failure:
        problem = " ".join(str(failure).split())[:200]
        return Node(name, node["Resources"], {}, problem=problem, node_id=node["NodeID"])
    return Node(name, node["Resources"], facts, skew, error, node_id=node["NodeID"])


def _skew(actor: Any) -> tuple[float, float]:
    """Return how far a node's clock is ahead, and by how much that may be wrong, in seconds."""
    before = time.time()
    there = ray.get(actor.clock.remote(), timeout=ANSWER_SECONDS)
    after = time.time()
    return there - (before + after) / 2, (after - before) / 2


def _dashboard(head: Node | None) -> Dashboard:
    address = ray._private.worker.global_worker.node.address_info.get("webui_url") or None
    if not address:
        return Dashboard(None)
    port = int(address.rpartition(":")[2])
    facts = head.facts if head is not None else {}
    listens_on = facts.get("listening", {}).get(port, ())
    return Dashboard(address, listens_on, lists_jobs_without_token(address), facts.get("kubernetes", False))


def lists_jobs_without_token(address: str) -> bool | None:
    """Whether the dashboard lists jobs to somebody without a token; None if it does not say."""
    try:
        # Without the proxy of this machine, whose refusal would look like the dashboard's.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{address}/api/jobs/", timeout=DASHBOARD_SECONDS) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        return False if error.code in REFUSALS else None
    except (OSError, ValueError):  # no answer from here, or one that is not Ray's
        return None
    return True


def _starts_nodes(head: Node | None) -> bool:
    """Whether an autoscaler starts nodes: one on the head with a configuration, or, in Kubernetes, one beside it."""
    configuration = head.facts.get("autoscaler") if head is not None else None
    if configuration is not None:
        return bool(configuration)
    state = autoscaling_state(ANSWER_SECONDS)
    return state is not None and state.autoscaler_state_version > 0


def _storage(recipe: Recipe, nodes: Sequence[tuple[Node, Any]]) -> list[Finding]:
    """Write to the storage from every node, read what the others wrote, and look at the room for checkpoints."""
    storage = recipe.run_uri.removesuffix(f"/{recipe.name}")
    folder = f"{storage}/.orpo-ray-doctor-{uuid.uuid4().hex[:8]}"
    able = nodes if not is_remote(storage) else [pair for pair in nodes if pair[0].facts["orpo_ray"] is not None]
    names = {node.name: f"node-{index}" for index, (node, _) in enumerate(able)}
    existed = is_remote(storage) or os.path.isdir(storage)
    written = ask([actor.write.remote(folder, names[node.name], node.name) for node, actor in able], ANSWER_SECONDS)
    errors = {node.name: problem or answer for (node, _), (answer, problem) in zip(able, written, strict=True)}
    # A node that did not answer still waits for its disk, and would cost the same time again.
    able = [pair for pair, (_, problem) in zip(able, written, strict=True) if problem is None]
    read = ask([actor.read.remote(folder, list(names.values())) for _, actor in able], ANSWER_SECONDS)
    seen: dict[str, list[str]] = {}
    for (node, _), (answer, problem) in zip(able, read, strict=True):
        if problem is None:
            seen[node.name] = list(answer.values())
        else:
            errors[node.name] = problem
    able = [pair for pair in able if pair[0].name in seen]
    ask([actor.remove.remote(folder, [] if existed else [storage]) for _, actor in able], ANSWER_SECONDS)
    found = checks.check_storage(storage, errors, seen)
    on_disk = recipe.checkpoint.scratch or "/tmp" if is_remote(storage) else storage
    room = ask([actor.free_bytes.remote(on_disk) for _, actor in able], ANSWER_SECONDS)
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
