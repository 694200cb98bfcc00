"""Which worker is named as slow, and the time of a worker's own work."""

from __future__ import annotations

import time

import pytest
import torch

from orpo_ray.objective.collectives import gather_step
from orpo_ray.training.step_times import SLOW_STEPS, WINDOW_STEPS, OwnTime, SlowWorkers, by_worker
from support.worker_group import worker_group

CPU = torch.device("cpu")
HOSTS = ["a", "b", "c"]
EQUAL = [100.0, 100.0, 100.0]


def test_a_slow_worker_is_named_once_with_its_machine() -> None:
    watch = SlowWorkers(HOSTS)
    found = [watch.observe(step, [1.0, 1.6, 0.9], EQUAL) for step in range(1, 31)]
    (text,) = found[SLOW_STEPS - 1]
    assert "worker 1 on b is slower than the others, which wait for it: step 15 took it 1.6 s, 1.7 times" in text
    assert [len(each) for each in found].count(0) == 29
    assert watch.figures() == {"slow_worker": 1, "slow_worker_steps": 30}


@pytest.mark.parametrize(
    ("seconds", "tokens"),
    [
        ([1.0, 1.5, 1.0], EQUAL),  # not above the factor
        ([1.0, 2.0, 1.0], [100.0, 200.0, 100.0]),  # more work
        ([1.0, 1.0, 1.0], [300.0, 100.0, 300.0]),  # little work, with a cost of its own
        ([1.0], [100.0]),
        ([0.0, 0.0, 0.0], EQUAL),
    ],
)
def test_a_worker_that_is_not_slower_than_the_others_is_not_named(seconds: list[float], tokens: list[float]) -> None:
    watch = SlowWorkers(HOSTS)
    assert not any(watch.observe(step, seconds, tokens) for step in range(1, 41))
    assert watch.figures() == {}


def test_a_pause_now_and_then_is_forgiven() -> None:
    watch = SlowWorkers(HOSTS)
    for step in range(1, 10 * WINDOW_STEPS):
        slow = step % WINDOW_STEPS < SLOW_STEPS - 1
        assert watch.observe(step, [1.0, 9.0 if slow else 1.0, 1.0], EQUAL) == []


def test_own_time_is_that_of_the_measured_work() -> None:
    own = OwnTime(CPU)
    for _ in range(2):
        with own.running():
            time.sleep(0.02)
        time.sleep(0.3)  # a wait for others
    assert 0.04 <= own.seconds() < 0.3


def gathered(rank: int, workers: int, counts: tuple[bool, ...] = (True, True)) -> list[object]:
    sums = {"loss": torch.tensor(1.5 + rank), "pairs": torch.tensor(2.0)}
    return list(gather_step(sums, {"seconds": 0.25 * rank, "stop": rank == 1}, CPU, counts[rank]))


def test_sums_are_added_and_figures_of_workers_kept_apart() -> None:
    for found in worker_group(2).run(gathered):
        assert found == [{"loss": 4.0, "pairs": 4.0}, {"seconds": [0.0, 0.25], "stop": [0.0, 1.0]}]
    for found in worker_group(2).run(gathered, (True, False)):  # the second computes the pairs of the first
        assert found == [{"loss": 1.5, "pairs": 2.0}, {"seconds": [0.0, 0.25], "stop": [0.0, 1.0]}]
    assert gathered(1, 1) == [{"loss": 2.5, "pairs": 2.0}, {"seconds": [0.25], "stop": [1.0]}]
    assert by_worker({"seconds": [0.5, 0.75]}) == {"worker_seconds/0": 0.5, "worker_seconds/1": 0.75}
