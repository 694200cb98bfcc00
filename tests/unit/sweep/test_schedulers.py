"""Schedulers, which must know what earlier sessions measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from orpo_ray.sweep.board import Board
from orpo_ray.sweep.live import SweepDisplay
from orpo_ray.sweep.schedulers import make_scheduler
from orpo_ray.sweep.searchers import RandomSampler
from orpo_ray.sweep.space import make_space
from orpo_ray.sweep.tuner import last_message
from support.planted_sweeps import EVERY, METRIC, STEPS, folder_of, planted_record, sweep_recipe


@dataclass(frozen=True)
class NewTrial:
    trial_id: str


def board_of(tmp_path: Path, scheduler: str) -> Board:
    recipe = sweep_recipe(tmp_path, scheduler=scheduler)
    record, space = planted_record(recipe)
    return Board(record, folder_of(recipe), RandomSampler(space, 0), together=1, num_trials=20)


@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
def test_a_new_trial_is_compared_with_those_of_earlier_sessions(tmp_path: Path, scheduler: str) -> None:
    board = board_of(tmp_path, scheduler)
    made = make_scheduler(board.record.tune, EVERY, STEPS, True, board)
    decisions = {}
    for name, value in (("bad", -9.0), ("good", 9.0)):
        trial = NewTrial(name)
        made.on_trial_add(None, trial)  # type: ignore[arg-type]
        decisions[name] = made.on_trial_result(None, trial, {"step": EVERY, METRIC: value})  # type: ignore[arg-type]
    assert decisions == {"bad": "CONTINUE" if scheduler == "none" else "STOP", "good": "CONTINUE"}


def test_without_a_terminal_a_sweep_is_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = board_of(tmp_path, "asha")
    board.record.price_per_hour = 2.0
    with SweepDisplay(
        board, make_space(board.record.recipe), board.record.recipe.run_uri, Console(width=200)
    ) as display:
        trial = board.next_trial()
        assert trial is not None
        display.began(trial.number)
        board.result(trial.number, {"step": 10, METRIC: 0.5})
        display.evaluated(trial.number)
        board.end(trial.number, "no [red]memory[/red]")
        display.ended(trial.number)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("0016  begins: beta ")
    assert lines[1].startswith(f"0016  step 10  {METRIC} 0.5000  16 of 20 trials over, about ")
    assert lines[2].startswith("0016  failed: no [red]memory[/red]  17 of 20 trials over")
    assert lines[2].endswith("spent")


def test_on_a_terminal_a_sweep_is_a_table_with_the_running_trials_first(tmp_path: Path) -> None:
    board = board_of(tmp_path, "asha")
    trial = board.next_trial()
    assert trial is not None
    run = Path(board.record.recipe.run_uri) / "trials" / trial.name
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 7, "train/pairs_per_second": 12.5}\n{"step": 8, "tra')
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    console.print(SweepDisplay(board, make_space(board.record.recipe), board.record.recipe.run_uri, console)._view())
    text = console.export_text().splitlines()
    assert "learning_rate" in text[0]
    assert text[1].split()[0] == trial.name
    assert "7/40" in text[1]
    assert "12.5" in text[1]
    assert text[-1].startswith("16 of 20 trials over")


def test_the_error_of_a_trial_is_its_first_line_without_the_traceback() -> None:
    text = "Failure # 1\nray::f() ...\nTraceback (most recent call last):\n  File x\n    y()\n"
    assert last_message(f"{text}orpo_ray.errors.UserError: a: wrong\n  fix: b\n") == "UserError: a: wrong"
    assert last_message("") == "its process ended"
