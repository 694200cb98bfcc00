"""What a run folder holds before the first step: the resolved recipe, the versions, and the identity of the data."""

from __future__ import annotations

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.reading import ReadSpec
from orpo_ray.storage.run_folder import RECIPE_FILE, RunFolder
from orpo_ray.training.data_identity import check_data
from orpo_ray.training.environment import write_environment

DEFAULT_CHECKPOINTS = 10


def with_saves(recipe: Recipe, num_steps: int) -> Recipe:
    """Fill in what a recipe leaves open: how often to save."""
    raw = recipe.model_dump(mode="json")
    raw["checkpoint"]["every_steps"] = recipe.checkpoint.every_steps or max(1, num_steps // DEFAULT_CHECKPOINTS)
    return parse_recipe(raw)


def open_run(recipe: Recipe, read: ReadSpec, folder: RunFolder, is_new: bool) -> None:
    """Write the files that a run begins with.

    Args:
        recipe: resolved.
        read: the training rows.
        folder: of the run; exists.
        is_new: whether the folder holds no run yet.

    Raises:
        UserError: the folder holds a run on other data.
    """
    check_data(read, folder, is_new=is_new)
    (folder.path / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    folder.push(RECIPE_FILE)
    write_environment(folder)
