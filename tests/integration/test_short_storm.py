"""A run whose workers and status actor are killed, and its checkpoints torn, ends as it would have without.

The faults of drivers and nodes are in `tests/nightly/test_storm.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.broken_rows import write_broken
from support.runs import run
from support.storm import PER_STEP, WITHIN_A_RUN, InThread, Storm, check_every_pair_once, storm_recipe

ROWS, FAULTS = 120, 3


@pytest.mark.timeout(600)
def test_every_pair_is_trained_once_in_a_short_storm(ray_cluster: None, tmp_path: Path) -> None:
    """Slow, since most faults cost the start of two workers."""
    data, reasons = write_broken(tmp_path / "data", ROWS, of_each=1)
    stormy = storm_recipe(
        tmp_path, "stormy", data, 1, None,
        checkpoint={"every_steps": 3, "keep": 3},
        deepspeed={"zero_stage": 2},
        scaling={"num_workers": 2, "max_failures": 100},
    )  # fmt: skip
    storm = Storm(stormy, lambda: InThread(stormy), 1, WITHIN_A_RUN)
    try:
        storm.rage(FAULTS, ROWS // PER_STEP)
    finally:
        storm.stop()
    assert len(storm.planted) == FAULTS
    calm = storm_recipe(tmp_path, "calm", data, 1, None)
    run(calm)
    check_every_pair_once(stormy, calm, ROWS, reasons)
