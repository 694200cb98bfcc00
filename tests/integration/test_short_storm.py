"""A run in which processes are killed and checkpoints torn ends as it would have without; see `tests/nightly`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.broken_rows import write_broken
from support.commands import on_this_cluster
from support.paths import TESTS
from support.runs import run
from support.storm import PER_STEP, Storm, check_every_pair_once, storm_recipe

ROWS, FAULTS = 120, 5


@pytest.mark.timeout(600)
def test_every_pair_is_trained_once_in_a_short_storm(ray_cluster: None, tmp_path: Path) -> None:
    """Slow, since each fault costs the start of a worker or of the command."""
    data, reasons = write_broken(tmp_path / "data", ROWS, of_each=1)
    stormy = storm_recipe(
        tmp_path, "stormy", data, 1, "in_turn",
        checkpoint={"every_steps": 3, "keep": 3},
        deepspeed={"zero_stage": 2},
        scaling={"num_workers": 2, "max_failures": 100},
    )  # fmt: skip
    path = tmp_path / "stormy.yaml"
    path.write_text(stormy.to_yaml())
    environment = on_this_cluster()
    environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "orpo_ray", "train", str(path)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    storm = Storm(stormy, start, seed=1)
    try:
        storm.rage(FAULTS, ROWS // PER_STEP)
    finally:
        storm.stop()
    assert len(storm.planted) == FAULTS
    calm = storm_recipe(tmp_path, "calm", data, 1, "quickly")
    run(calm)
    check_every_pair_once(stormy, calm, ROWS, reasons)
