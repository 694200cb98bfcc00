"""A worker waits for the others as long as `scaling.timeout_s` says, also in ZeRO's collectives."""

from __future__ import annotations

import time

import pytest

from support.engine_memory import end_engine
from support.engines_by_hand import Training, recipe_of
from support.worker_group import WorkerGroup

TIMEOUT_S = 4.0


def late_step(rank: int, workers: int, late_s: float) -> float:
    """Rank 1 is late for the second step; returns how long that step took."""
    recipe = recipe_of(deepspeed={"zero_stage": 2}, scaling={"num_workers": workers, "timeout_s": TIMEOUT_S})
    training = Training(recipe, rank, workers)
    training.step()
    if rank == 1:
        time.sleep(late_s)
    started = time.perf_counter()
    training.step()
    end_engine(training.engine)
    return time.perf_counter() - started


def test_a_late_worker_is_waited_for_and_a_lost_one_is_not() -> None:
    group = WorkerGroup(2)  # its own, since a collective fails in it
    try:
        assert group.run(late_step, 1.0)[0] >= 1.0
        started = time.perf_counter()
        with pytest.raises(AssertionError, match="Timed out"):
            group.run(late_step, 120.0)
        assert time.perf_counter() - started < 60
    finally:
        group.close()
