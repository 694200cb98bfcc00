"""Every shipped recipe is valid, states its requirements, and states the memory that the plan predicts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_ray.config.load import load_recipe
from orpo_ray.config.objectives import OBJECTIVES
from orpo_ray.data.from_recipe import all_data
from orpo_ray.data.reading import pair_of, read_windows
from orpo_ray.errors import UserError
from orpo_ray.planning.known_shapes import KNOWN_SHAPES
from orpo_ray.tiny_models.build import is_tiny
from support.paths import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MEMORY = re.compile(r"# Memory: ([0-9.]+) GiB")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_states_its_requirements(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    head = path.read_text().split("name:")[0]
    for word in ("# Hardware: ", "# Memory: ", "# Data: "):
        assert word in head
    assert is_tiny(recipe.model.id) or recipe.model.id in KNOWN_SHAPES
    assert is_tiny(recipe.model.id) or MEMORY.search(head)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_every_objective(path: Path, objective: str) -> None:
    """As docs/objectives.md says: with `orpo={}`; without it, the message names it if the recipe has the section."""
    assert load_recipe(path, ["orpo={}", f"objective={objective}"]).objective.name == objective
    has_section = bool(load_recipe(path).orpo.model_fields_set)
    if has_section and objective != "orpo":
        with pytest.raises(UserError, match=r"on the command line: orpo=\{\}"):
            load_recipe(path, [f"objective={objective}"])
    else:
        assert load_recipe(path, [f"objective={objective}"]).objective.name == objective


def test_the_own_data_example(tmp_path: Path) -> None:
    script = ROOT / "recipes" / "own-data" / "make_pairs.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "my-pairs")], check=True, cwd=ROOT)
    files = [f"data.{name}={tmp_path}/my-pairs/{file}.jsonl" for name, file in (("train", "train"), ("eval", "test"))]
    recipe = load_recipe(ROOT / "recipes" / "own-data-multilingual.yaml", files)
    read, _ = all_data(recipe)
    rows = [row for table in read_windows(read, [(0, 0)]) for row in table.to_pylist()]
    pairs = [pair_of(row) for row in rows]
    assert len(pairs) == 2000
    texts = "".join(pair.chosen for pair in pairs)  # type: ignore[union-attr]
    for letter in ("円", "круг", "त", "د"):
        assert letter in texts
    assert set(read.format_names) == {"plain"}
