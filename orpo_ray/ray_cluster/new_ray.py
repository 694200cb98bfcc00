"""Settings of a Ray that starts on this machine, for which `ray.init` has no arguments."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import socket
from collections.abc import Iterator
from functools import wraps
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._raylet import persist_port  # type: ignore[attr-defined]

# Ports of the process beside a raylet that imports most: arguments of `start_raylet`, and names of the files that a
# raylet waits for.
_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
# Below the ports that Linux and macOS give to processes which ask for any: another one could get a port a moment later.
_UNUSED = (20_000, 30_000)
_ATTEMPTS = 1000
_TIMEOUT = 300  # seconds for the start of a process of Ray; by default 30 or 60, too few on a busy machine


@contextlib.contextmanager
def settings_of_new_ray(is_alone: bool = False) -> Iterator[None]:
    """Set what helps the Ray that is started in this context on a busy machine, and what it needs beside another Ray.

    All its processes get the address. A process without one that asks Ray for the state of an actor (Ray Train's
    cleaner after a stopped trial) looks for any cluster on the machine. If there is an old or a second one, the cleaner
    fails, a stopped trial keeps its CPUs, and a sweep hangs.

    Args:
        is_alone: see `agents_expected`.
    """
    [port] = unused_ports(1)
    register = max(_TIMEOUT * 1000, int(os.environ.get("RAY_agent_register_timeout_ms", 0)))
    own = {
        "RAY_GCS_SERVER_PORT": str(port),
        "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}",
        "RAY_agent_register_timeout_ms": str(register),
    }
    before = {name: os.environ.get(name) for name in own}
    timeout = ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S
    vars(ray_constants)["RAY_DASHBOARD_STARTUP_TIMEOUT_S"] = max(_TIMEOUT, timeout)
    os.environ |= own
    try:
        with agents_expected(is_alone):
            yield
    finally:
        vars(ray_constants)["RAY_DASHBOARD_STARTUP_TIMEOUT_S"] = timeout
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def agents_expected(is_alone: bool = False) -> Iterator[None]:
    """Tell the raylets that this process starts in this context which ports their dashboard agents will have.

    By itself, a raylet waits until its agents have written their ports to files, for 15 seconds and no longer. On a
    busy machine, the dashboard agent is still importing its libraries by then, and the raylet ends. Besides, one of its
    ports is fixed by default, and a second Ray on the machine takes no submitted jobs.

    The agent that prepares the processes of workers chooses its port as before, within the 15 seconds. A raylet trusts
    what answers there, and no other user of the machine may know the port before the agent listens.

    Args:
        is_alone: whether the machine has no other users, so that the port of that agent is chosen too.
    """
    ports = (*_PORTS, "runtime_env_agent_port") if is_alone else _PORTS
    start = services.start_raylet

    @wraps(start)
    def start_with_ports(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(start).bind(*args, **kwargs)
        given = call.arguments
        for name, port in zip(ports, unused_ports(len(ports)), strict=True):
            given[name] = port
            persist_port(given["session_dir"], given["node_id"], name, port)
        return start(*call.args, **call.kwargs)

    vars(services)["start_raylet"] = start_with_ports
    try:
        yield
    finally:
        vars(services)["start_raylet"] = start


def unused_ports(count: int) -> list[int]:
    """Return different ports of loopback on which nothing listens. Raises OSError if there are too few."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for _ in range(_ATTEMPTS):
            if len(found) == count:
                return found
            candidate = socket.socket()
            try:
                candidate.bind(("127.0.0.1", random.randint(*_UNUSED)))
            except OSError:  # something listens there
                candidate.close()
                continue
            held.enter_context(candidate)
            found.append(candidate.getsockname()[1])
    raise OSError(f"no {count} unused ports between {_UNUSED[0]} and {_UNUSED[1]}")
