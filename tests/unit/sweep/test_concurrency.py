"""How many trials run at a time, what they cost, and when a sweep ends for its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_ray.errors import UserError
from orpo_ray.streaming.pipeline import least_cpus
from orpo_ray.sweep.board import Board
from orpo_ray.sweep.budget import BudgetStopper, price_of
from orpo_ray.sweep.concurrency import DRIVER_CPUS, divide_cluster
from orpo_ray.sweep.record import Record
from orpo_ray.sweep.searchers import RandomSampler
from orpo_ray.sweep.space import make_space
from support.planted_sweeps import METRIC, folder_of, sweep_recipe


@pytest.mark.parametrize(
    ("nodes", "scaling", "expected"),
    [
        ([{"CPU": 2.0}], {}, 1),
        ([{"CPU": 16.0}], {}, 8),
        ([{"CPU": 16.0}], {"num_workers": 4}, 3),
        ([{"CPU": 32.0, "GPU": 4.0}], {}, 4),
        ([{"CPU": 32.0, "GPU": 4.0}], {"num_workers": 4}, 1),
        ([{"CPU": 32.0, "GPU": 2.0}], {"gpus_per_worker": 0.3}, 6),
        ([{"CPU": 16.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 1.0}], {"gpus_per_worker": 0.5}, 4),
        ([{"CPU": 32.0, "GPU": 4.0}], {"gpus_per_worker": 0}, 8),
        ([{"CPU": 3.0, "GPU": 8.0}], {"cpus_per_worker": 1}, 2),
    ],
    ids=str,
)
def test_as_many_trials_as_the_cluster_has_room_for(
    nodes: list[dict[str, float]], scaling: dict[str, Any], expected: int
) -> None:
    recipe = sweep_recipe(Path("runs"))
    changed = recipe.scaling.model_copy(update=scaling)
    recipe = recipe.model_copy(update={"scaling": changed})
    cluster = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    together, resources = divide_cluster(recipe, 8, cluster, nodes)
    assert together == expected
    workers = together * recipe.scaling.max_workers
    assert workers * resources.cpus + together * DRIVER_CPUS + least_cpus(together) <= cluster["CPU"]
    assert workers * resources.gpus <= cluster["GPU"]


def test_more_trials_at_a_time_than_fit_are_refused() -> None:
    recipe = sweep_recipe(Path("runs"), max_concurrent=8)
    with pytest.raises(UserError, match=r"8 worker\(s\) need 8 GPU"):
        divide_cluster(recipe, 8, {"CPU": 64.0, "GPU": 4.0}, [{"CPU": 64.0, "GPU": 4.0}])


def test_a_cost_budget_needs_a_price() -> None:
    tune = sweep_recipe(Path("runs"), max_cost=5).tune
    h100 = [{"GPU": 8.0, "accelerator_type:H100": 1.0}]
    assert price_of(tune, ["H100=2"], h100, 1.0) == 2.0
    assert price_of(tune, [], [*h100, {"GPU": 1.0, "accelerator_type:L4": 1.0}], 1.0) == 3.2
    with pytest.raises(UserError, match="trials without GPUs"):
        price_of(tune, [], [{"CPU": 8.0}], 0.0)
    with pytest.raises(UserError, match="type unknown"):
        price_of(tune, [], [{"GPU": 8.0}], 1.0)
    assert price_of(sweep_recipe(Path("runs")).tune, [], [{"CPU": 8.0}], 0.0) == 0.0


@pytest.mark.parametrize(
    ("budget", "expected"),
    [({"max_hours": 0.5}, "tune.max_hours (0.5) is reached"), ({"max_cost": 1}, "tune.max_cost ($1.00) is spent"),
     ({}, "")],
)  # fmt: skip
def test_a_sweep_ends_when_its_budget_is_spent_and_its_trials_can_go_on(
    tmp_path: Path, budget: dict[str, Any], expected: str
) -> None:
    recipe = sweep_recipe(tmp_path, **budget)
    space = make_space(recipe)
    record = Record(recipe, seconds=1790.0, price_per_hour=4.0, gpus_per_trial=1.0)
    board = Board(record, folder_of(recipe), RandomSampler(space, 0), together=2, num_trials=8)
    stopper = BudgetStopper(board)
    first = board.next_trial()
    assert first is not None
    board.result(first.number, {"step": 10, METRIC: 0.5})
    first.own_seconds = 890.0
    assert not stopper.stop_all()
    board._before, first.own_seconds = 1801.0, 905.0
    assert stopper.stop_all() is bool(expected)
    assert board.stopped_by == expected
    if expected:
        assert board.next_trial() is None
        board.close()
        assert first.state == "interrupted"


def test_trials_that_share_a_process_divide_its_time(tmp_path: Path) -> None:
    """Three for a minute, then two for another one: 20 s of the first, and 20 + 30 s of each other."""
    recipe = sweep_recipe(tmp_path)
    record = Record(recipe, gpus_per_trial=1.0)
    board = Board(record, folder_of(recipe), RandomSampler(make_space(recipe), 0), together=3, num_trials=8)
    trials = [trial for _ in range(3) if (trial := board.next_trial()) is not None]
    board.share(trials)
    for _ in range(2):
        for number in board._counted:
            board._counted[number] -= 60
        board.end(trials.pop(0).number)
    board.close()
    assert [trial.own_seconds for trial in record.trials] == pytest.approx([20, 50, 50], abs=5)
    assert [trial.seconds for trial in record.trials] == pytest.approx([60, 120, 120], abs=5)
    assert record.hours == pytest.approx(120 / 3600, rel=0.1)
