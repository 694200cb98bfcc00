"""Start a Ray on this machine, or join the one that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import ray

from orpo_ray.errors import UserError


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it), or start one on this machine.

    Raises UserError where RAY_ADDRESS names no cluster that answers.
    """
    if ray.is_initialized():
        return
    # A new process takes seconds to import what encoding needs: keep idle ones between training and evaluation.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    # Ray lowers the priority of all its workers; here only encoders should yield (see data/pipeline.py).
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A run has some ten small actors; on two cores Ray warns about that many at once.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    address = os.environ.get("RAY_ADDRESS")
    # Worker output goes to Ray's logs; what a user should see comes through the board.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not address:
        # The nodes of a Ray that is this machine alone are not preempted, and the watcher is one more process to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Not address=None: that joins whatever cluster was last started here, and waits minutes for one that has died.
        with own_address():
            ray.init(address="local", **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        fix = "unset it to run on this machine alone, or start a cluster: ray start --head"
        raise UserError(str(error).split("\n")[0], field="RAY_ADDRESS", value=address, fix=fix) from None


@contextlib.contextmanager
def own_address() -> Iterator[None]:
    """Tell the processes of a Ray that is about to start here where it is.

    Those that ask Ray for the state of an actor (Train's cleaner after a stopped trial) look for a cluster on the
    machine otherwise; with an old or a second one there they fail, a stopped trial keeps its CPUs, and a sweep hangs.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    own = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}
    os.environ |= own
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name)
