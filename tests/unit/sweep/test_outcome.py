"""What a sweep leaves behind: the table, the best recipe, the page, the record."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from orpo_ray.config.load import load_recipe
from orpo_ray.errors import UserError
from orpo_ray.sweep.importance import importances
from orpo_ray.sweep.outcome import write_outcome
from orpo_ray.sweep.page import render_sweep
from orpo_ray.sweep.record import Record, read_record, resume_or_begin
from orpo_ray.sweep.space import make_space
from orpo_ray.training.launch import TrainingFailed
from support.planted_sweeps import METRIC, folder_of, planted_record, sweep_recipe


def test_the_table_has_a_line_for_each_trial_and_the_best_recipe_loads(tmp_path: Path) -> None:
    recipe = sweep_recipe(tmp_path)
    record, space = planted_record(recipe)
    record.gpus_per_trial, record.price_per_hour = 2.0, 3.6
    folder = folder_of(recipe)
    sweep = write_outcome(record, space, folder)
    with Path(sweep.table).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [trial.name for trial in record.trials]
    best = record.ranked()[0]
    row = rows[best.number]
    assert (row["state"], float(row["orpo.beta"])) == ("finished", best.params["orpo.beta"])
    assert float(row[METRIC]) == best.value(METRIC)
    assert float(row["cost"]) == pytest.approx(60 / 3600 * 2 * 3.6, abs=1e-4)
    assert rows[-2]["error"].startswith("TrainingDiverged")
    loaded = load_recipe(sweep.best_recipe)
    assert loaded.name == "sweep-best"
    assert loaded.orpo.beta == best.params["orpo.beta"]
    assert sweep.best == best.name
    assert sweep.trials[0].metric == best.value(METRIC)


def test_a_trial_that_was_stopped_early_is_not_the_best(tmp_path: Path) -> None:
    record, _ = planted_record(sweep_recipe(tmp_path))
    early = next(trial for trial in record.trials if trial.state == "stopped early")
    early.history[-1][METRIC] = 99.0
    assert record.ranked()[0].state == "finished"
    states = [trial.state for trial in record.ranked()]
    assert states == sorted(states, key=["finished", "stopped early", "failed"].index)


def test_a_sweep_without_a_value_says_why(tmp_path: Path) -> None:
    recipe = sweep_recipe(tmp_path)
    record, space = planted_record(recipe, 2)
    for trial in record.trials:
        trial.state, trial.error, trial.history = "failed", "out of memory", []
    with pytest.raises(TrainingFailed, match="0000 failed: out of memory; 0001 failed: out of memory"):
        write_outcome(record, space, folder_of(recipe))
    assert (Path(recipe.run_uri) / "trials.csv").exists()


def test_the_page_is_closed_to_the_network_and_shows_texts_as_texts(tmp_path: Path) -> None:
    record, space = planted_record(sweep_recipe(tmp_path))
    page = render_sweep(record, space, doubt="0001 cannot be told from 0002", ended_by="tune.max_hours (1) is reached")
    assert "<b>nan</b>" not in page
    assert "&lt;b&gt;nan&lt;/b&gt;" in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert " style=" not in page
    for text in ("0001 cannot be told from 0002", "tune.max_hours (1) is reached", "1 of 16 trials failed"):
        assert text in page
    assert page.count('class="trial ') == 15 + 2 * 16  # without the failed trial, over steps
    for trial in record.trials:
        assert page.count(f'data-trial="{trial.name}"') == (3 if trial.state == "failed" else 4)


def test_the_field_that_matters_is_found_and_the_other_is_not(tmp_path: Path) -> None:
    record, space = planted_record(sweep_recipe(tmp_path), count=30)
    found, compared, step = importances(record, space)
    assert (compared, step) == (29, 10)  # the last step that all of them were evaluated at
    assert [each.key for each in found] == ["optim.learning_rate", "orpo.beta"]
    rate, beta = found
    assert rate.is_clear
    assert rate.share > 0.5
    assert not beta.is_clear
    for each in found:
        assert 0 <= each.low <= each.share <= each.high <= 1


def test_fields_without_effect_are_seldom_called_clear(tmp_path: Path) -> None:
    import numpy as np

    rng, clear = np.random.default_rng(1), 0
    record, space = planted_record(sweep_recipe(tmp_path), count=12)
    for _ in range(20):
        for trial in record.trials:
            for line in trial.history:
                line[METRIC] = float(rng.normal())
        clear += sum(each.is_clear for each in importances(record, space)[0])
    assert clear <= 6  # of 40, of which 2 are expected


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    recipe = sweep_recipe(tmp_path)
    record, _ = planted_record(recipe)
    folder = folder_of(recipe)
    record.save(folder)
    found = read_record(folder)
    assert found == record
    record.trials[3].state = "running"
    record.save(folder)
    assert resume_or_begin(recipe, folder).trials[3].state == "interrupted"
    more = sweep_recipe(tmp_path, num_trials=99, max_hours=2)
    assert len(resume_or_begin(more, folder).trials) == 16


def test_a_sweep_of_another_recipe_is_refused(tmp_path: Path) -> None:
    recipe = sweep_recipe(tmp_path)
    folder = folder_of(recipe)
    planted_record(recipe)[0].save(folder)
    other = sweep_recipe(tmp_path, {"orpo.beta": {"low": 0.1, "high": 1.0}})
    with pytest.raises(UserError, match=r"differ in tune\.search"):
        resume_or_begin(other, folder)
    (folder.path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="the record of the sweep cannot be read"):
        resume_or_begin(recipe, folder)


def test_a_page_of_one_trial_with_choices_is_drawn(tmp_path: Path) -> None:
    recipe = sweep_recipe(tmp_path, {"model.dtype": {"choices": ["float32", "bfloat16"]}})
    record = Record(recipe, num_steps=40)
    trial = record.new({"model.dtype": "bfloat16"})
    trial.history, trial.state = [{"step": 40, "seconds": 3.0, METRIC: 0.5}], "finished"
    page = render_sweep(record, make_space(recipe))
    assert "bfloat16" in page
    assert "It takes 5 trials" in page
