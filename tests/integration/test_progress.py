"""What workers tell a run's status reaches the console."""

from __future__ import annotations

import io

import pytest
import ray
from rich.console import Console

from orpo_ray.training.progress import ProgressDisplay, RunStatus


@pytest.mark.usefixtures("ray_cluster")
def test_a_warning_is_printed_once_as_it_is() -> None:
    status = RunStatus.remote()  # type: ignore[attr-defined]
    out = io.StringIO()
    with ProgressDisplay(status, Console(file=out, width=40)):
        ray.get(status.warn.remote("tracker [wandb] failed and is off for the rest of this run"))
    told = "warning: tracker [wandb] failed and is off for the rest of this run"
    assert out.getvalue().splitlines().count(told) == 1
