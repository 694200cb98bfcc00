"""Runs that last until they are stopped, on clusters whose nodes come and go, and a run to compare them with."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.recipe import Recipe
from support.clusters import training_on, workers_by_step
from support.runs import last_step, wait_until
from support.tiny_runs import losses, tiny_recipe

STARTED = 600  # seconds that starting workers may take while other tests run


def elastic_recipe(storage: Path, name: str, **scaling: Any) -> Recipe:
    """Return a recipe that lasts until it is stopped, with losses that do not depend on its length."""
    return tiny_recipe(
        storage,
        name,
        data={"format": "support.slow_rows:slowly"},
        # Runs of two workers and of one drift apart by rounding, faster at a higher rate: with 1e-3, to 3e-4 at step
        # 80, before anything happens to the nodes.
        optim={"max_steps": 5000, "epochs": 1000, "schedule": "constant", "learning_rate": 1e-4},
        # A node has three CPUs: one worker, and room for the data.
        scaling={"num_workers": [1, 2], "cpus_per_worker": 1.6, "resize_interval_s": 2, **scaling},
    )


def wait_for_workers(recipe: Recipe, process: subprocess.Popen[str], count: int, since: int) -> int:
    """Wait for three steps with a number of workers, after a step; returns the last step."""

    def steps() -> list[int]:
        assert process.poll() is None, process.stderr and process.stderr.read()
        return [step for step, workers in workers_by_step(recipe).items() if workers == count and step > since]

    wait_until(lambda: len(steps()) >= 3, f"three steps with {count} worker(s)", STARTED)
    return max(steps())


def stop(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    return err


def check_curve(cluster: Any, recipe: Recipe, folder: Path) -> None:
    """Compare the losses of a run with those of one that one worker makes without interruption."""
    curve = losses(Path(recipe.run_uri))
    assert sorted(curve) == list(range(1, len(curve) + 1))
    alone = elastic_recipe(folder, "alone", num_workers=1)
    with training_on(cluster, alone, folder) as process:
        wait_until(lambda: last_step(Path(alone.run_uri)) >= len(curve), "the reference", STARTED)
        stop(process)
    expected = losses(Path(alone.run_uri))
    assert curve == pytest.approx({step: expected[step] for step in curve}, abs=1e-4)
