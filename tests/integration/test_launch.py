"""What the driver does while the workers start: a failure there is the error of the run, and ends the workers."""

from __future__ import annotations

import errno
import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from orpo_ray.errors import UserError
from orpo_ray.training.launch import launch_training
from support.commands import on_this_cluster, orpo_ray
from support.runs import wait_until
from support.tiny_runs import tiny_recipe

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(180)]


class FullAtTheHeadline(io.StringIO):
    """A log on a disk without room for the run's first lines."""

    def write(self, text: str) -> int:
        if "pairs" in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_driver_that_cannot_print_ends_its_workers(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        launch_training(tiny_recipe(tmp_path, "run"), Console(file=FullAtTheHeadline()))


def test_a_model_that_is_not_there_is_an_error_of_the_user(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run", model={"id": "no/such-model"})
    with pytest.raises(UserError, match="no/such-model"):
        launch_training(recipe, Console(file=io.StringIO()))
    assert not (Path(recipe.run_uri) / "recipe.yaml").exists()


@pytest.mark.nightly
def test_nodes_that_never_come_end_the_run_within_its_limit(tmp_path: Path) -> None:
    """On a cluster that starts no nodes. In a process of its own, which a signal ends."""
    scaling = {"nodes_timeout_s": 5, "accelerator_type": "H100", "num_workers": 2}
    (tmp_path / "recipe.yaml").write_text(tiny_recipe(tmp_path, "none", scaling=scaling).to_yaml())
    started = time.monotonic()
    done = orpo_ray("train", str(tmp_path / "recipe.yaml"), env=on_this_cluster())
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - started < 90
    assert "no room for 2 worker(s) with 1 CPU(s), 1 GPU(s) each, an accelerator H100" in done.stderr
    assert "within 5 s; it has 1 node(s) with" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_is_ended_leaves_nothing_on_the_cluster(tmp_path: Path) -> None:
    """In a process that goes on, such as a notebook."""
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address

    def controllers() -> list[str]:
        alive = [("class_name", "=", "TrainController"), ("state", "=", "ALIVE")]
        return [actor.actor_id for actor in list_actors(address, filters=alive)]

    before = controllers()
    scaling = {"nodes_timeout_s": 5, "accelerator_type": "H100"}
    with pytest.raises(UserError, match="no room for 1 worker"):
        launch_training(tiny_recipe(tmp_path, "ended", scaling=scaling), Console(file=io.StringIO()))
    wait_until(lambda: set(controllers()) <= set(before), "the end of its controller", 30)
    wait_until(
        lambda: all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values()),
        "the end of its group",
        10,
    )
