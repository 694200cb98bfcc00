"""`orpo-ray evaluate` of a run that held out a fraction of its rows: the command line may name other pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ray.errors import UserError
from orpo_ray.evaluation.targets import _recipe_of
from orpo_ray.storage.run_folder import FINAL, RECIPE_FILE, RunFolder
from support.tiny_runs import tiny_recipe


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a finished run with `data.eval_fraction`."""
    recipe = tiny_recipe(tmp_path, "run", data={"train": "pairs.jsonl", "eval_fraction": 0.1})
    folder = tmp_path / "run"
    (folder / FINAL).mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(recipe.to_yaml())
    return RunFolder(str(folder))


def test_the_fraction_stays_unless_other_pairs_are_named(run: RunFolder) -> None:
    data = _recipe_of(run, [])[0].data
    assert (list(data.eval), data.eval_fraction) == ([], 0.1)
    assert _recipe_of(run, ["data.eval={}"])[0].data.eval_fraction == 0.1


def test_other_pairs_replace_the_fraction(run: RunFolder) -> None:
    data = _recipe_of(run, ["data.eval=/other.jsonl"])[0].data
    assert (list(data.eval), data.eval_fraction) == (["/other.jsonl"], 0)


def test_both_on_the_command_line_are_refused_and_the_fix_works(run: RunFolder) -> None:
    both = ["data.eval=/other.jsonl", "data.eval_fraction=0.2"]
    with pytest.raises(UserError, match=r"set data\.eval_fraction=0 or data\.eval=\{\}"):
        _recipe_of(run, both)
    assert _recipe_of(run, [*both, "data.eval_fraction=0"])[0].data.eval_fraction == 0
    assert _recipe_of(run, [*both, "data.eval={}"])[0].data.eval_fraction == 0.2
