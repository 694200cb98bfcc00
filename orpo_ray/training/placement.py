"""Which nodes may hold the workers of a run, and how long it waits for an autoscaling cluster to start them."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import ray
from ray._private.label_utils import validate_label_selector
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from orpo_ray.config.schema import ScalingConfig
from orpo_ray.errors import UserError
from orpo_ray.ray_cluster.autoscaler import autoscaling_state

ACCELERATOR = "accelerator_type:"  # how Ray names the resource of a node that has such a GPU
POLL_SECONDS = 1.0
REFUSED_SECONDS = 10.0  # for which the autoscaler must say so; it looks at the requests every few seconds
RAY_WAITS_LONGER = 60.0  # seconds, so that the message here comes first


def fitting_nodes(scaling: ScalingConfig, nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the resources of the nodes that the workers may run on.

    Args:
        scaling: of the recipe.
        nodes: as `ray.nodes()` lists them.

    Raises:
        UserError: a label is not valid; or no node may hold a worker, and the run does not wait for others.
    """
    wrong = validate_label_selector(scaling.labels)
    if wrong:
        raise UserError(wrong, field="scaling.labels", value=scaling.labels, fix="see Ray's label selectors")
    alive = [node for node in nodes if node["Alive"]]
    found = [dict(node["Resources"]) for node in alive if _fits(scaling, node)]
    if not found and not scaling.nodes_timeout_s:
        raise UserError(
            f"no node of the cluster has {_wanted(scaling)}; it has {describe(alive)}",
            field="scaling.accelerator_type" if scaling.accelerator_type else "scaling.labels",
            value=scaling.accelerator_type or scaling.labels,
            fix="change it, add such nodes, or set scaling.nodes_timeout_s on a cluster that starts them by itself",
        )
    return found


def describe(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Say what nodes a cluster has."""
    shown = []
    for node in nodes:
        resources, labels = node["Resources"], node.get("Labels") or {}
        kinds = [name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)]
        kinds += [f"{name}={value}" for name, value in labels.items() if not name.startswith("ray.io/node-")]
        extra = f" ({', '.join(kinds)})" if kinds else ""
        shown.append(f"{resources.get('CPU', 0):g} CPU(s), {resources.get('GPU', 0):g} GPU(s){extra}")
    counted = {text: shown.count(text) for text in shown}
    return "; ".join(f"{count} node(s) with {text}" for text, count in counted.items()) or "no nodes"


class TellPlaced(WorkerGroupCallback):
    """Tells the run's status when Ray has nodes for all workers.

    Args:
        status: the run's `RunStatus`.
    """

    def __init__(self, status: Any) -> None:
        self._status = status

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Tell it."""
        self._status.update.remote(is_placed=True)


class NodesWait:
    """Context manager that ends the run if the cluster does not start nodes for its workers in time.

    Args:
        scaling: of the recipe.
        per_worker: Ray's resources of each worker.
        status: the run's `RunStatus`, which `TellPlaced` tells.
        abort: raises an error in the thread that waits for the run.
        warn: prints a warning.
    """

    def __init__(
        self,
        scaling: ScalingConfig,
        per_worker: Mapping[str, float],
        status: Any,
        abort: Callable[[UserError], None],
        warn: Callable[[str], None],
    ) -> None:
        self._scaling, self._per_worker, self._status, self._abort = scaling, per_worker, status, abort
        self._warn = warn
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> NodesWait:
        if self._scaling.nodes_timeout_s:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()

    def _wait(self) -> None:
        deadline = time.monotonic() + self._scaling.nodes_timeout_s
        refused_since: float | None = None
        has_warned = False
        while not self._over.wait(POLL_SECONDS):
            try:
                if ray.get(self._status.state.remote()).get("is_placed"):
                    return
            except ray.exceptions.RayError:
                return  # the run is over
            now = time.monotonic()
            if now > deadline:
                self._abort(no_room(self._scaling, self._scaling.min_workers, self._per_worker))
                return
            if not has_warned and _autoscaler_refuses(self._scaling.min_workers, self._per_worker):
                refused_since = refused_since or now
                has_warned = now > refused_since + REFUSED_SECONDS
                if has_warned:
                    self._warn(
                        f"the autoscaler can start no nodes for {_asked(self._scaling, self._per_worker)}: no pool has "
                        "such nodes, or its nodes are taken; the run waits for them for "
                        f"{max(0.0, deadline - now):.0f} s more (scaling.nodes_timeout_s)"
                    )
            else:
                refused_since = None


def _autoscaler_refuses(workers: int, per_worker: Mapping[str, float]) -> bool:
    """Say whether Ray's autoscaler has found that it can start no nodes for some workers now. Its version 1 never does.

    Args:
        workers: how many.
        per_worker: Ray's resources of each.
    """
    state = autoscaling_state(POLL_SECONDS)
    if state is None:
        return False
    for group in state.infeasible_gang_resource_requests:
        bundles = group.bundle_selectors[0].resource_requests if group.bundle_selectors else group.requests
        asked = [dict(each.resources_bundle) for each in bundles]
        if len(asked) == workers and all(_covers(each, per_worker) for each in asked):
            return True
    return False


def _covers(bundle: Mapping[str, float], resources: Mapping[str, float]) -> bool:
    """Whether a bundle asks for these resources, which Ray rounds to ten-thousandths."""
    return all(math.isclose(bundle.get(name, -1.0), amount, abs_tol=1e-3) for name, amount in resources.items())


def no_room(scaling: ScalingConfig, workers: int, per_worker: Mapping[str, float]) -> UserError:
    """Return the error that an autoscaling cluster has started no nodes for some workers.

    Args:
        scaling: of the recipe.
        workers: how many at least.
        per_worker: Ray's resources of each.
    """
    has = describe([node for node in ray.nodes() if node["Alive"]])
    return UserError(
        f"the cluster has no room for {_asked(scaling, per_worker, workers)}, and has started no nodes for them within "
        f"{scaling.nodes_timeout_s:g} s; it has {has}",
        field="scaling.nodes_timeout_s",
        value=scaling.nodes_timeout_s,
        fix="`ray status` says what the autoscaler does; ask for what a pool has, raise the pool's maximum or your "
        "quota, or wait longer",
    )


def waiting_variables(scaling: ScalingConfig) -> dict[str, str]:
    """Return the variables with which Ray Train waits for nodes as long as the recipe says."""
    if not scaling.nodes_timeout_s:
        return {}
    return {WORKER_GROUP_START_TIMEOUT_S_ENV_VAR: str(scaling.nodes_timeout_s + RAY_WAITS_LONGER)}


def _asked(scaling: ScalingConfig, per_worker: Mapping[str, float], workers: int | None = None) -> str:
    asked = ", ".join(f"{amount:g} {name}(s)" for name, amount in per_worker.items())
    wanted = _wanted(scaling)
    return f"{workers or scaling.min_workers} worker(s) with {asked} each" + (f", {wanted}" if wanted else "")


def _wanted(scaling: ScalingConfig) -> str:
    parts = [f"an accelerator {scaling.accelerator_type}"] if scaling.accelerator_type else []
    parts += [f"the label {name}: {value}" for name, value in scaling.labels.items()]
    return " and ".join(parts)


def _fits(scaling: ScalingConfig, node: Mapping[str, Any]) -> bool:
    if scaling.accelerator_type and f"{ACCELERATOR}{scaling.accelerator_type}" not in node["Resources"]:
        return False
    labels = node.get("Labels") or {}
    return all(_has_label(labels.get(name), wanted) for name, wanted in scaling.labels.items())


def _has_label(value: str | None, wanted: str) -> bool:
    """Whether a label matches a selector of Ray: `a`, `!a`, `in(a,b)` or `!in(a,b)`."""
    text = wanted.removeprefix("!")
    choices = re.fullmatch(r"in\((.*)\)", text)
    accepted = [each.strip() for each in choices[1].split(",")] if choices else [text]
    return (value in accepted) != wanted.startswith("!")
