"""A run that a signal stops keeps what it has done, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orpo_ray.config.recipe import Recipe
from support.commands import orpo_ray_here
from support.runs import last_step, run, wait_until
from support.tiny_runs import losses, tiny_recipe

STEPS = 60
SECTIONS: dict[str, Any] = {"optim": {"max_steps": STEPS}, "scaling": {"num_workers": 2}}


def start(recipe: Recipe, folder: Path) -> subprocess.Popen[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "orpo_ray", "train", str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(
    ray_cluster: None, tmp_path: Path, number: int
) -> None:
    recipe = tiny_recipe(tmp_path, "stopped", **SECTIONS)  # saves every 100 steps
    process = start(recipe, tmp_path)
    wait_until(lambda: last_step(Path(recipe.run_uri)) >= 8, "step 8")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    step = last_step(Path(recipe.run_uri))
    assert process.returncode == 128 + number, err
    assert f"stopped: {signal.Signals(number).name} after step {step}, with a checkpoint" in err
    assert "SIGTERM received" not in err  # the crash dump of Ray's native code
    assert 8 <= step < STEPS
    wait_until(lambda: not any(child.is_running() for child in children), "the end of all its processes")

    again = orpo_ray_here("train", str(tmp_path / "recipe.yaml"))
    assert again.returncode == 0, again.stderr
    reference = run(tiny_recipe(tmp_path, "reference", **SECTIONS | {"scaling": {"num_workers": 1}}))
    assert losses(Path(recipe.run_uri)) == pytest.approx(losses(Path(reference.run_uri)), abs=1e-4)
