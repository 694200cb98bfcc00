"""`orpo-ray init`: every shipped recipe is listed with hardware and memory, and can be written and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ray.config.load import load_recipe
from orpo_ray.config.shipped_recipes import shipped_recipes, write_recipe
from orpo_ray.errors import UserError
from support.commands import orpo_ray_here
from support.paths import ROOT


def test_every_recipe_is_listed_with_hardware_and_memory() -> None:
    recipes = shipped_recipes()
    assert [recipe.name for recipe in recipes] == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    for recipe in recipes:
        assert "GPU" in recipe.hardware or "CPU" in recipe.hardware, recipe.name
        assert recipe.memory.split()[1] in ("GB", "GiB"), recipe.name


def test_init_lists_and_writes(tmp_path: Path) -> None:
    listed = orpo_ray_here("init", cwd=tmp_path)
    assert all(recipe.name in listed.stderr for recipe in shipped_recipes())
    written = orpo_ray_here("init", "smolvlm-500m-lora", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert "orpo-ray train smolvlm-500m-lora.yaml" in written.stderr
    assert load_recipe(tmp_path / "smolvlm-500m-lora.yaml").model.lora is not None
    again = orpo_ray_here("init", "smolvlm-500m-lora", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    orpo_ray_here("init", "quickstart", "--output", "mine.yaml", cwd=tmp_path)
    assert load_recipe(tmp_path / "mine.yaml").name == "quickstart"


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such recipe.*\n.*quickstart"):
        write_recipe("quick", None)
    with pytest.raises(UserError, match="cannot write the recipe"):
        write_recipe("quickstart", tmp_path / "none" / "x.yaml")
