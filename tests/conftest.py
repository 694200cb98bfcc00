"""Fixtures of all tests: a local Ray cluster, folders of tiny models."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from functools import partialmethod

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# The models are tiny, and tests run on as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Runs choose their own number of threads. Threads that wait for each other must not spin on the cores of other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without a time limit per example, which a busy machine would exceed.
settings.register_profile("orpo-ray", deadline=None)
settings.load_profile("orpo-ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("torchvision") is None:
        for item in items:
            if item.get_closest_marker("torchvision"):
                item.add_marker(pytest.mark.skip(reason="needs torchvision: see `make torchvision-tests`"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a skipped test fail in `make root-tests`, which has everything that its tests need."""
    report = yield
    if report.skipped and os.environ.get("ORPO_RAY_NO_SKIPS"):
        report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with four logical CPUs, for the whole session."""
    import ray
    from ray._private.parameter import RayParams
    from ray._private.utils import write_ray_address

    from orpo_ray.fork_server.control import forked_workers, start_fork_server
    from orpo_ray.ray_cluster.new_ray import settings_of_new_ray
    from orpo_ray.ray_cluster.private import on_loopback
    from orpo_ray.ray_cluster.start import train_variables

    # As `start_ray` sets them.
    os.environ["RAY_idle_worker_killing_time_threshold_ms"] = "60000"
    os.environ["RAY_worker_niceness"] = "0"
    os.environ["RAY_worker_maximum_startup_concurrency"] = "8"
    os.environ["RAY_prestart_worker_first_driver"] = "0"
    # Seconds between two looks at all processes of the machine, which are 5 otherwise.
    os.environ["METRICS_RECORD_INTERVAL_S"] = "60"
    variables = {"env_vars": train_variables()}
    # "local", because None would join a cluster that already runs on this machine.
    start_fork_server(["peft"])
    # No test reads what workers print, which Ray's log monitor looks for all the time.
    own = partialmethod(RayParams.__init__, include_log_monitor=False)
    with pytest.MonkeyPatch.context() as patch, on_loopback(), settings_of_new_ray(is_alone=True), forked_workers():
        patch.setattr(RayParams, "__init__", own)
        sessions = tempfile.mkdtemp(prefix="ray-")  # a short path, as it is part of the names of sockets
        ray.init(
            "local",
            num_cpus=4,
            _temp_dir=sessions,
            runtime_env=variables,
            dashboard_host="127.0.0.1",  # `ray job submit` needs the dashboard
            log_to_driver=False,
            logging_level="warning",
        )
    # Otherwise the driver of a submitted job joins any Ray on the machine, such as that of the other test process.
    write_ray_address(ray.get_runtime_context().gcs_address, sessions)
    yield
    ray.shutdown()
    shutil.rmtree(sessions, ignore_errors=True)  # a process of Ray may still write


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny model of every family, without its processor, which may require torchvision."""
    from orpo_ray.tiny_models.families import TINY_FAMILIES

    found = {}
    for name, family in TINY_FAMILIES.items():
        found[name] = str(tmp_path_factory.mktemp(name))
        family().model().save_pretrained(found[name])
    return found
