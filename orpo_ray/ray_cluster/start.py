"""Start Ray on this machine, or join the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address, find_gcs_addresses
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.fork_server.control import forked_workers
from orpo_ray.ray_cluster.new_ray import settings_of_new_ray
from orpo_ray.ray_cluster.private import make_session_parent, make_token, on_loopback, session_parent

CONNECT_TIMEOUT = 10.0  # seconds


class RayNotStarted(OrpoRayError):
    """Ray did not start on this machine."""


def start_ray(*, state_api: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS names, as in a submitted job, or start Ray on this machine.

    Args:
        state_api: whether a Ray that is started here can be asked for the state of its actors, as Ray Train's cleaner
            does after a stopped trial. Ray's dashboard answers that, whose processes take seconds to start.

    Raises:
        UserError: no cluster answers at RAY_ADDRESS, or it refuses this process's token.
        RayNotStarted: Ray did not start on this machine.
    """
    if ray.is_initialized():
        return
    # Without this, every command begins with a warning that Ray's default, token authentication, is on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # A new encoder needs seconds to import its libraries: keep idle processes between training and evaluation.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    # Ray lowers the priority of all its workers; here, only encoders have a lower one (streaming/pipeline.py).
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A run has about ten small actors; on two cores, Ray warns about so many at once.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    # Ray starts a process for each core at once, in an environment that none of this package's tasks has.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    address = os.environ.get("RAY_ADDRESS")
    # Worker output goes to Ray's logs; what users should see comes through `RunStatus`.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not address:
        # address=None would join the cluster that was started here last, and wait for minutes if it has died.
        with on_loopback(), settings_of_new_ray():
            _start_here(include_dashboard=state_api, runtime_env={"env_vars": train_variables()}, **quiet)
        return
    try:
        if address == "auto":
            address = _running_here()
        _check_answer(address)
        is_here = address.startswith(("127.", "localhost:"))
        with on_loopback() if is_here else contextlib.nullcontext():
            ray.init(address=address, **quiet)
    except OSError as error:
        fix = "unset it to run on this machine alone, or start a cluster: ray start --head"
        raise UserError(
            f"no Ray cluster answers at this address: {str(error).splitlines()[0]}",
            field="RAY_ADDRESS",
            value=address,
            fix=fix,
        ) from None
    _start_lasting_actors()


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that keeps a task or an actor on the node of the caller, which must be connected to Ray."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def train_variables() -> dict[str, str]:
    """Return the variables that Ray Train sets for its workers.

    As the whole job has them, Ray can give an idle process of the driver's tasks to the tasks of a worker.
    """
    # This machine is not preempted, and Ray Train's watcher for that is one more process to start.
    names = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
    return {name: os.environ.setdefault(name, value) for name, value in names.items()}


def _start_here(**options: Any) -> None:
    try:
        make_token()
        with forked_workers():
            ray.init(address="local", _temp_dir=str(make_session_parent() / "ray"), **options)
    except Exception as error:  # Ray raises bare exceptions, for example when its raylet starts too late
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logs = session_parent() / "ray" / "session_latest" / "logs"
        raise RayNotStarted(
            f"Ray did not start on this machine: {reason[0]}\n"
            f"  fix: close other programs and try again; Ray's logs are in {logs}"
        ) from error


def _running_here() -> str:
    """Return the address of the Ray that runs on this machine, as Ray finds it for `auto`. Raises OSError.

    With `auto`, Ray presents a token even if RAY_AUTH_MODE is not set; with an address, it does not. So this sets it.
    """
    with contextlib.suppress(ImportError):  # versions of Ray that never present a token by themselves
        from ray._private.authentication import authentication_token_setup

        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    find_gcs_addresses.cache_clear()
    with on_loopback():  # otherwise it would be the machine's address, where a Ray on 127.0.0.1 does not listen
        return str(canonicalize_bootstrap_address("auto"))


def _start_lasting_actors() -> None:
    """Start the actors of Ray Data that outlive a run, on the driver's node.

    Otherwise, they start where data is read first. A node that an autoscaling cluster has started for a run would never
    be idle then.
    """
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_stats_actor()
    with contextlib.suppress(ImportError):  # some versions of Ray do not have this one
        from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

        get_or_create_usage_collection_actor()


def _check_answer(address: str) -> None:
    """Connect to a `host:port` address once, since Ray itself tries for two minutes, and check the token.

    Raises OSError if nothing listens, and UserError.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
        from orpo_ray.ray_cluster.token_check import check_token  # gRPC is not needed without a cluster

        check_token(address)
