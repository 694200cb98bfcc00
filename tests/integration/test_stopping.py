"""A run that a signal stops keeps what it has done, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from support.commands import orpo_ray_here
from support.runs import last_step, run, wait_until
from support.tiny_runs import LONG, losses, same_curve, tiny_recipe

SECTIONS: dict[str, Any] = {"optim": LONG, "scaling": {"num_workers": 2}}
STEPS = 60  # of a run that goes on while another one is refused


def start(recipe: Recipe, folder: Path) -> subprocess.Popen[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "orpo_ray", "train", str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(
    reference: dict[int, float], tmp_path: Path, number: int
) -> None:
    recipe = tiny_recipe(tmp_path, "stopped", **SECTIONS)  # saves every 100 steps
    process = start(recipe, tmp_path)
    wait_until(lambda: last_step(Path(recipe.run_uri)) >= 8, "step 8")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    step = last_step(Path(recipe.run_uri))
    assert process.returncode == 128 + number, err
    assert f"stopped: {signal.Signals(number).name} with a checkpoint of step {step};" in err
    assert "SIGTERM received" not in err  # the crash dump of Ray's native code
    assert 8 <= step < LONG["max_steps"]
    wait_until(lambda: not any(child.is_running() for child in children), "the end of all its processes")

    again = orpo_ray_here("train", str(tmp_path / "recipe.yaml"))
    assert again.returncode == 0, again.stderr
    same_curve(Path(recipe.run_uri), reference)


def test_two_runs_in_one_folder_and_a_dead_status_actor(ray_cluster: None, tmp_path: Path) -> None:
    """The second run is refused. The first one goes on, also without the process that its workers report to."""
    import ray
    from ray.util.state import list_actors

    recipe = tiny_recipe(tmp_path, "one-writer", optim={"max_steps": STEPS})
    said: list[str] = []

    def disturb() -> None:
        wait_until(lambda: last_step(Path(recipe.run_uri)) >= 2, "step 2")
        with pytest.raises(UserError) as refused:
            run(recipe)
        said.append(str(refused.value))
        address = ray.get_runtime_context().gcs_address
        filters = [("class_name", "=", "RunStatus"), ("state", "=", "ALIVE")]
        actors = list_actors(address, filters=filters, detail=True)
        newest = max((psutil.Process(actor.pid) for actor in actors), key=lambda process: process.create_time())
        newest.kill()
        said.append(f"killed before step {last_step(Path(recipe.run_uri))}")

    thread = threading.Thread(target=disturb)
    thread.start()
    run(recipe)
    thread.join()
    assert f"another run writes to this run folder: process {os.getpid()} on" in said[0]
    assert said[1] != f"killed before step {STEPS}"
    assert sorted(losses(Path(recipe.run_uri))) == list(range(1, STEPS + 1))
    assert not (Path(recipe.run_uri) / "lease.json").exists()
