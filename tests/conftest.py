"""Shared by all tests: real pairs in small files, a real Ray on this machine, recipes that take seconds."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("torchvision") is None:
        for item in items:
            if item.get_closest_marker("torchvision"):
                item.add_marker(pytest.mark.skip(reason="needs torchvision: see `make torchvision-tests`"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of four logical CPUs on loopback, ended with the session."""
    import ray

    from orpo_ray.ray_cluster import own_address

    os.environ["RAY_idle_worker_killing_time_threshold_ms"] = "60000"
    os.environ["RAY_worker_niceness"] = "0"
    # "local": None would join a cluster that somebody started on this machine.
    with own_address():
        ray.init("local", num_cpus=4, log_to_driver=False, logging_level="warning", dashboard_host="127.0.0.1")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every family's tiny model without its processor, which may need what is not installed."""
    from orpo_ray.tiny_models.families import TINY_FAMILIES

    found = {}
    for name, family in TINY_FAMILIES.items():
        found[name] = str(tmp_path_factory.mktemp(name))
        family().model().save_pretrained(found[name])
    return found
