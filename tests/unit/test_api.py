"""The Python interface: light to import, the same functions as the commands, results that a notebook shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import orpo_ray
from orpo_ray import api
from orpo_ray.api import Evaluation, Run, as_recipe
from orpo_ray.errors import UserError
from orpo_ray.evaluation.evaluate_run import Evaluation as Scored
from orpo_ray.evaluation.summary import summarize
from orpo_ray.exporting.export import Exported
from orpo_ray.sweep.outcome import Sweep
from orpo_ray.synthesis.outcome import Synthesized
from orpo_ray.synthesis.rounds import Rounds
from support.paths import ROOT
from support.planted_runs import planted_run
from support.planted_scores import planted

RAW = {"name": "x", "model": {"id": "orpo-ray/tiny-smolvlm"}, "data": {"train": "easy-vqa:train"}}


def test_import_is_light_and_functions_come_when_asked_for() -> None:
    code = (
        "import sys, orpo_ray\n"
        "heavy = {'torch', 'ray', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\nassert not heavy, heavy\n"
        "from orpo_ray import Recipe, check_data, evaluate, export, iterate, plan, synthesize, train, tune\n"
        "import orpo_ray.exporting.export\n"
        "from orpo_ray import export as again\nassert again is export and callable(export)\n"
        "heavy = {'ray', 'deepspeed'} & {name for name in sys.modules if name != 'ray'}\nassert not heavy, heavy\n"
    )
    code = code.replace("import orpo_ray.exporting.export\n", "")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert set(orpo_ray.__all__) <= set(dir(orpo_ray))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        orpo_ray.nothing  # noqa: B018


def test_a_recipe_is_a_file_a_mapping_or_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nmodel: {id: orpo-ray/tiny-smolvlm}\ndata: {train: easy-vqa:train}\n")
    overrides = {
        "optim.learning_rate": 1e-5,
        "data.eval": ["a.jsonl", "b.jsonl"],
        "model.lora": {"r": 4},
        "name": "yes",
    }
    for source in (path, str(path), RAW, as_recipe(RAW)):
        recipe = as_recipe(source, overrides)
        assert (recipe.optim.learning_rate, list(recipe.data.eval), recipe.name) == (
            1e-5,
            ["a.jsonl", "b.jsonl"],
            "yes",
        )
        assert recipe.model.lora is not None
    assert RAW["name"] == "x"
    with pytest.raises(UserError, match="unknown field"):
        as_recipe(RAW, {"optim.lr": 1})


def test_overrides_are_a_mapping_or_as_on_the_command_line() -> None:
    for overrides in (["optim.max_steps=3"], ("optim.max_steps=3",), {"optim.max_steps": 3}):
        assert as_recipe(RAW, overrides).optim.max_steps == 3
    for wrong in ("optim.max_steps=3", [3], 3, {"name": object()}):
        with pytest.raises(UserError, match=r"overrides: (.|\n)*fix: give"):
            as_recipe(RAW, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", [None, 3, ["name"], {"name": object()}])
def test_what_is_no_recipe_is_refused_with_the_fix(recipe: Any) -> None:
    with pytest.raises(UserError, match=r"recipe: (.|\n)*fix: give"):
        api.plan(recipe)


def test_numbers_are_checked_by_the_names_of_arguments() -> None:
    for pairs in ("x", 0, True):
        with pytest.raises(UserError, match=r"^pairs: must be a whole number of at least 1"):
            api.plan(RAW, pairs=pairs)  # type: ignore[arg-type]
    assert "500 training pairs" in str(api.plan(RAW, pairs=np.int64(500)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^generate: must be a whole number of at least 0"):
        api.evaluate("none", generate=-1)
    with pytest.raises(UserError, match=r"^workers: must be a whole number of at least 1"):
        api.evaluate("none", workers=0)


def test_a_plan_prints_its_tables() -> None:
    plan = api.plan(RAW, ["data.train=none.jsonl"], pairs=100)
    assert "this recipe by GPU type" in str(plan)
    assert "{" not in repr(plan)


def test_a_run_and_an_evaluation_show_in_a_notebook(tmp_path: Path) -> None:
    folder = planted_run(tmp_path)
    run = Run(str(folder), {}, str(folder / "report.html"))
    shown = run._repr_html_()
    assert shown.startswith("<iframe sandbox=")
    assert "Better than the model before training" in shown
    assert shown.count("<") == 2  # everything inside is escaped
    assert len(run.history()) > 100
    scored = Scored({"eval/pairs": 200.0}, summarize(planted(200, 0.9, 0.5)))
    table = Evaluation(scored.metrics, scored)._repr_html_()
    assert "The model uses its images" in table
    assert "<pre" in table


def test_the_page_about_python_names_what_there_is() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    compile(code, "python.md", "exec")
    functions = set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE))
    assert functions == set(orpo_ray.__all__) - {"Recipe", "__version__"}
    for name, attributes in re.findall(r"`(\w+)`: ((?:`[\w()]+`(?:, )?)+)", page):
        kind = (
            getattr(api, name, None) or {each.__name__: each for each in (Sweep, Exported, Synthesized, Rounds)}[name]
        )
        for attribute in re.findall(r"\w+", attributes):
            assert attribute in kind.__dataclass_fields__ or hasattr(kind, attribute), (name, attribute)
