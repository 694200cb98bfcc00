"""Start probes on nodes, and wait for their answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orpo_ray.doctor import probe
from orpo_ray.doctor.probe import NodeProbe


@contextlib.contextmanager
def probes(node_ids: Sequence[str], num_gpus: float = 0.0) -> Iterator[list[Any]]:
    """Start a probe on each of some nodes, and end them.

    Args:
        node_ids: Ray's ids of the nodes.
        num_gpus: for each probe.

    Yields:
        The actors.
    """
    remote = ray.remote(num_cpus=0, max_restarts=0)(NodeProbe)
    started: list[Any] = []
    ray.cloudpickle.register_pickle_by_value(probe)  # a node may lack this package
    try:
        for each in node_ids:
            strategy = NodeAffinitySchedulingStrategy(each, soft=False)
            started.append(remote.options(scheduling_strategy=strategy, num_gpus=num_gpus).remote())
    finally:
        ray.cloudpickle.unregister_pickle_by_value(probe)
    try:
        yield started
    finally:
        for actor in started:
            ray.kill(actor)


def ask(asked: Sequence[ray.ObjectRef], seconds: float) -> list[tuple[Any, str | None]]:
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
