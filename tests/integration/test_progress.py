"""What workers tell a run's status reaches the console, and survives the death of the actor that keeps it."""

from __future__ import annotations

import io
import os
import signal
import time
from typing import Any

import pytest
import ray
from rich.console import Console

from orpo_ray.errors import UserError
from orpo_ray.training.progress import ProgressDisplay, waits_for
from orpo_ray.training.run_status import start_status

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_warning_is_printed_once_as_it_is() -> None:
    status = start_status()
    out = io.StringIO()
    with ProgressDisplay(status, Console(file=out, width=40)):
        ray.get(status.warn.remote("tracker [wandb] failed and is off for the rest of this run"))
    told = "warning: tracker [wandb] failed and is off for the rest of this run"
    assert out.getvalue().splitlines().count(told) == 1


def kill(status: Any) -> None:
    """End the actor's process, as a lack of memory does, and wait until it is another one."""
    pid = ray.get(status.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    while ray.get(status.__ray_call__.remote(lambda self: os.getpid())) == pid:
        pass


def test_a_new_process_of_the_actor_forgets_nothing() -> None:
    status = start_status()
    out = io.StringIO()
    with ProgressDisplay(status, Console(file=out, width=1000)) as display:
        display.config = ray.put("config")
        ray.get(status.begin.remote([display.config]))
        ray.get(status.warn.remote("first"))
        kill(status)
        ray.get(status.warn.remote("second"))
        ray.get([status.update.remote(saved_at=7), status.request_stop.remote()])
        ray.get(status.fail.remote(UserError("wrong", field="data.train")))
        kill(status)
        state = ray.get(status.state.remote())
        assert (state["saved_at"], state["warnings"]) == (7, ["first", "second"])
        assert ray.get(status.update.remote(step=8)) is True
        assert str(ray.get(status.fatal.remote())) == "data.train: wrong"
    assert [line for line in out.getvalue().splitlines() if "warning" in line] == ["warning: first", "warning: second"]
    assert start_status() != status  # another run begins without all that
    assert ray.get(start_status().state.remote())["warnings"] == []


def test_what_workers_wait_for_is_said() -> None:
    """A placement group that the cluster cannot hold now; otherwise the processes themselves take their time."""
    assert waits_for() == "their processes import the libraries"
    group = ray.util.placement_group([{"CPU": 60.0}, {"CPU": 40.0}])
    try:
        deadline = time.monotonic() + 30
        while "waiting" not in waits_for() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert waits_for() == "waiting for 100 CPU; free now: 4 CPU"
    finally:
        ray.util.remove_placement_group(group)
