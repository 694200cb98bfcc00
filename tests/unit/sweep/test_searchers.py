"""Searchers, run as a sweep runs them, with a planted function in place of a training."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from orpo_ray.config.recipe import Recipe
from orpo_ray.storage.run_folder import OPTUNA_FILE
from orpo_ray.sweep.board import Board
from orpo_ray.sweep.record import Record, resume_or_begin
from orpo_ray.sweep.searchers import make_sampler
from orpo_ray.sweep.space import make_space
from support.planted_sweeps import METRIC, STEPS, folder_of, surface, sweep_recipe

TRIALS = 24


def board_of(recipe: Recipe, together: int = 1) -> Board:
    space, folder = make_space(recipe), folder_of(recipe)
    record = resume_or_begin(recipe, folder)
    sampler = make_sampler(recipe.tune, space, recipe.name, folder, record.trials)
    num_trials = len(space.grid()) if recipe.tune.searcher == "grid" else recipe.tune.num_trials
    return Board(record, folder, sampler, together, num_trials)


def search(recipe: Recipe, most: int = 1000) -> Record:
    """Run up to `most` trials of a sweep on the planted surface."""
    board = board_of(recipe)
    for _ in range(most):
        if (trial := board.next_trial()) is None:
            break
        for step in (STEPS // 2, STEPS):
            report = {"step": step, METRIC: surface(trial.params, step), "final": step == STEPS}
            board.result(trial.number, report | {"eval/grounding_gap": trial.params["orpo.beta"]})
        board.end(trial.number)
    return board.record


def best(record: Record) -> float:
    value = record.ranked()[0].value(METRIC)
    assert value is not None
    return value


@pytest.mark.parametrize("seeds", [5, pytest.param(10, marks=pytest.mark.nightly)])
def test_tpe_finds_better_values_than_random_search(tmp_path: Path, seeds: int) -> None:
    found = {
        searcher: statistics.median(
            best(search(sweep_recipe(tmp_path / f"{searcher}{seed}", searcher=searcher, num_trials=TRIALS, seed=seed)))
            for seed in range(seeds)
        )
        for searcher in ("random", "tpe")
    }
    assert found["tpe"] > found["random"] + 0.005, found
    assert found["tpe"] <= 1.5


@pytest.mark.parametrize("searcher", ["random", "grid", "tpe"])
def test_an_interrupted_search_goes_on_with_what_it_knows(tmp_path: Path, searcher: str) -> None:
    recipe = sweep_recipe(tmp_path / "a", searcher=searcher, num_trials=9)
    first = search(recipe, most=4)
    kept = [trial.params for trial in first.trials]
    board = board_of(recipe)
    running = board.next_trial()
    assert running is not None
    board.result(running.number, {"step": STEPS // 2, METRIC: 0.1})  # and then the driver is lost
    again = search(recipe)
    assert [trial.params for trial in again.trials[:5]] == [*kept, running.params]
    assert len(again.trials) == 9
    assert all(trial.state == "finished" for trial in again.trials)
    assert [line["step"] for line in again.trials[4].history] == [STEPS // 2, STEPS]
    if searcher != "tpe":
        whole = search(sweep_recipe(tmp_path / "b", searcher=searcher, num_trials=9))
        assert [trial.params for trial in again.trials] == [trial.params for trial in whole.trials]


def test_optunas_storage_has_every_trial_with_its_values_and_state(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    recipe = sweep_recipe(tmp_path, searcher="tpe", num_trials=6)
    search(recipe, most=3)
    board = board_of(recipe)
    for ending in ("stopped", "failed"):
        trial = board.next_trial()
        assert trial is not None
        board.result(trial.number, {"step": 10, METRIC: 0.25})
        board.end(trial.number, "lost" if ending == "failed" else None)
    search(recipe)
    journal = optuna.storages.journal.JournalFileBackend(str(Path(recipe.run_uri) / OPTUNA_FILE))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(journal))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3 + ["PRUNED", "FAIL", "COMPLETE"]
    assert study.trials[3].intermediate_values == {10: 0.25}
    assert study.trials[5].user_attrs == {"trial": "0005"}
    assert study.best_value == pytest.approx(best(board_of(recipe).record))


def test_two_metrics_leave_the_trials_that_no_other_beats(tmp_path: Path) -> None:
    recipe = sweep_recipe(tmp_path, searcher="tpe", num_trials=12, scheduler="none", second_metric="eval/grounding_gap")
    record = search(recipe)
    front = record.front()
    assert record.ranked()[0] in front
    for trial in front:
        for other in record.trials:
            assert not (
                other.value(METRIC) > trial.value(METRIC)  # type: ignore[operator]
                and other.params["orpo.beta"] > trial.params["orpo.beta"]
            )
    assert len(front) < 12


def test_choices_that_are_lists_can_be_searched_by_tpe(tmp_path: Path) -> None:
    choices = {"data.train": {"choices": ["easy-vqa:train", ["easy-vqa:train", "easy-vqa:test"]]}}
    recipe = sweep_recipe(tmp_path, {"orpo.beta": {"low": 0.01, "high": 1.0}} | choices, searcher="tpe", num_trials=6)
    board = board_of(recipe)
    seen = []
    while (trial := board.next_trial()) is not None:
        seen.append(len(trial.params["data.train"]))
        board.result(trial.number, {"step": STEPS, METRIC: float(seen[-1]), "final": True})
        board.end(trial.number)
    assert set(seen) == {1, 2}
