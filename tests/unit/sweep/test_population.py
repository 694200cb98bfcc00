"""Population-based training: who is replaced, by what, and from which checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.sweep.board import Board
from orpo_ray.sweep.inherit import NoCheckpoint, inherit_checkpoint
from orpo_ray.sweep.population import Population, check_population
from orpo_ray.sweep.record import resume_or_begin
from orpo_ray.sweep.searchers import make_sampler
from orpo_ray.sweep.space import make_space
from support.planted_sweeps import METRIC, folder_of, sweep_recipe


def board_of(storage: Path, together: int = 4, count: int = 4) -> Board:
    recipe = sweep_recipe(storage, scheduler="pbt", num_trials=count)
    space, folder = make_space(recipe), folder_of(recipe)
    record = resume_or_begin(recipe, folder)
    sampler = make_sampler(recipe.tune, space, recipe.name, folder)
    return Board(record, folder, sampler, together, count, Population(space, record))


def test_the_worst_goes_on_from_the_best_with_changed_values(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    trials = [board.next_trial() for _ in range(4)]
    assert board.next_trial() is None
    for number, value in enumerate([0.5, 0.9, 0.7]):
        board.result(number, {"step": 10, METRIC: value})
        assert not board.is_replaced(number)  # nobody knows yet who is the worst of four
    board.result(3, {"step": 10, METRIC: 0.1})
    assert board.is_replaced(3)
    assert not board.is_exhausted
    board.end(3)
    successor = board.next_trial()
    assert successor is not None
    assert (successor.name, successor.parent, successor.parent_step) == ("0004", 1, 10)
    best = trials[1]
    assert best is not None
    assert successor.params != best.params
    for dimension in make_space(board.record.recipe):
        assert dimension.low <= successor.params[dimension.key] <= dimension.high
    assert board.record.trial(3).state == "replaced"
    for number, value in ((0, 0.6), (1, 1.0), (2, 0.8), (4, 0.95)):
        board.result(number, {"step": 20, METRIC: value, "final": True})
        assert not board.is_replaced(number)  # a trial that is at its end stays
        board.end(number)
    assert board.is_exhausted
    assert [trial.state for trial in board.record.trials] == ["finished"] * 3 + ["replaced", "finished"]


def test_a_successor_survives_its_driver(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    for number, value in enumerate([0.5, 0.9, 0.7, 0.1]):
        board.next_trial()
        board.result(number, {"step": 10, METRIC: value})
    assert board.is_replaced(3)
    board.end(3)
    again = board_of(tmp_path)
    waiting = [again.next_trial() for _ in range(4)]
    assert [trial and trial.name for trial in waiting] == ["0000", "0001", "0002", "0004"]


def test_trials_one_after_another_are_compared_too(tmp_path: Path) -> None:
    board = board_of(tmp_path, together=1)
    for number, value in enumerate([0.5, 0.9, 0.7]):
        board.next_trial()
        board.result(number, {"step": 10, METRIC: value})
        board.result(number, {"step": 20, METRIC: value, "final": True})
        board.end(number)
    board.next_trial()
    board.result(3, {"step": 10, METRIC: 0.1})
    assert board.is_replaced(3)


def test_the_worst_is_replaced_though_it_was_evaluated_first(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    for number, value in enumerate([0.1, 0.9, 0.7, 0.5]):
        board.next_trial()
        board.result(number, {"step": 10, METRIC: value})
        assert not board.is_replaced(number)
    board.result(1, {"step": 20, METRIC: 0.95})
    board.result(0, {"step": 20, METRIC: 0.2})  # at step 20 there are two; at step 10, four
    assert board.is_replaced(0)
    successor = board.record.trials[-1]
    assert (successor.parent, successor.parent_step) == (1, 20)


@pytest.mark.parametrize(
    ("search", "sections", "expected"),
    [
        ({"model.lora.r": {"choices": [8, 16]}}, {}, "'model.lora.r' cannot change within a run"),
        ({"optim.pairs_per_step": {"low": 2, "high": 8}}, {}, "'optim.pairs_per_step' cannot change within a run"),
        ({"orpo.beta": {"low": 0.1, "high": 1}}, {"zero_stage": 2}, "needs an unsharded optimizer"),
    ],
)
def test_what_cannot_change_within_a_run_is_refused(
    tmp_path: Path, search: dict, sections: dict, expected: str
) -> None:
    recipe = sweep_recipe(tmp_path, search, scheduler="pbt")
    recipe = recipe.model_copy(update={"deepspeed": recipe.deepspeed.model_copy(update=sections)})
    with pytest.raises(UserError, match=expected):
        check_population(recipe, make_space(recipe))


def test_a_checkpoint_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    donor, heir = RunFolder(str(tmp_path / "a")), RunFolder(str(tmp_path / "b"))
    donor.make()
    with pytest.raises(NoCheckpoint, match="has no whole checkpoint of step 10"):
        inherit_checkpoint(donor, 10, heir, wait_s=0)
