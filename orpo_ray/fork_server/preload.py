"""What the fork server imports, once for all of its forks."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

# What Ray's workers and Ray Train's controller import besides.
WITH_RAY = (
    "ray.train",
    "ray.tune",
    "ray.data",
    "ray.data._internal.execution.streaming_executor",
    "ray.data._internal.planner.planner",
    "pydantic.v1",
    "pyarrow.json",
    "orpo_ray.training.launch",
    "orpo_ray.training.worker",
    "orpo_ray.training.replicated_engine",
)


def preload(modules: Iterable[str]) -> None:
    """Import modules, and take them out of the reach of the collector, which would make every fork copy them."""
    gc.disable()  # it would look through all modules again and again: a seventh of the time
    # DeepSpeed's autotuner, which no run uses, imports MLflow where it is installed: more than a second.
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    for name in modules:
        importlib.import_module(name)
    if sys.modules["mlflow"] is None:
        del sys.modules["mlflow"]
    gc.enable()
    gc.freeze()


def preload_ray() -> None:
    """Import Ray and what imports it, without use of Ray's random generator, whose state forks would share.

    Two workers that draw the same identifiers, say of a task, end an actor that both of them call.
    """
    import ray.actor

    kind: Any = ray.actor.ActorClassID
    # `@ray.remote` draws one for each class.
    vars(ray.actor)["ActorClassID"] = SimpleNamespace(from_random=lambda: kind(os.urandom(kind.size())))
    preload(WITH_RAY)
    vars(ray.actor)["ActorClassID"] = kind
