"""A run through thirty faults on a cluster of several nodes ends as it would have without them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.broken_rows import write_broken
from support.clusters import cluster_of, start_training
from support.commands import orpo_ray
from support.paths import TESTS
from support.storm import MAX_NODES, PER_STEP, Storm, check_every_pair_once, storm_recipe

ROWS = 400


@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize(("seed", "num_faults", "epochs"), [(1, 30, 3), (2, 30, 3), (3, 30, 3), (4, 7, 1)])
def test_every_pair_is_trained_once_an_epoch_in_a_storm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, num_faults: int, epochs: int
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    data, reasons = write_broken(tmp_path / "data", ROWS, of_each=1)
    stormy = storm_recipe(
        tmp_path, "stormy", data, epochs, "in_turn",
        checkpoint={"every_steps": 5, "keep": 3},
        deepspeed={"zero_stage": 2},
        scaling={"num_workers": [1, 2], "cpus_per_worker": 1.6, "resize_interval_s": 2, "max_failures": 100},
    )  # fmt: skip
    with cluster_of(1 + MAX_NODES) as cluster:
        storm = Storm(stormy, lambda: start_training(cluster, stormy, tmp_path), seed, cluster=cluster)
        try:
            storm.rage(num_faults, epochs * ROWS // PER_STEP)
        finally:
            storm.stop()
        assert len(storm.planted) == num_faults
    # One worker on a Ray of its own, without sharding and without faults.
    calm = storm_recipe(tmp_path, "calm", data, epochs, "quickly")
    path = tmp_path / "calm.yaml"
    path.write_text(calm.to_yaml())
    done = orpo_ray("train", str(path), env={"RAY_ADDRESS": ""})
    assert done.returncode == 0, done.stderr
    check_every_pair_once(stormy, calm, ROWS, reasons)
