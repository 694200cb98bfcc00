"""Compare the recipe of a run folder with the one given, and pin the commit of the model."""

from __future__ import annotations

import re

from orpo_ray.config.load import parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import METRICS_FILE, RECIPE_FILE, RunFolder

# A resumed run may change these: they decide how it runs, not what it computes.
MAY_CHANGE = ("scaling", "checkpoint", "tracking", "eval", "tune", "synthesize", "model.vision_cache")


def pinned(recipe: Recipe, saved: Recipe | None) -> Recipe:
    """Return the recipe with the model's revision replaced by a commit of the hub.

    A branch may move during a run; a resumed run must use the weights and the processor that it began with.

    Args:
        recipe: the recipe to run.
        saved: the recipe of the run so far, whose commit is kept; None for a new run.
    """
    # Imported here: it brings in torch, and check_run_folder should answer before that.
    from orpo_ray.model.loading import commit_of

    revision = saved.model.revision if saved is not None else commit_of(recipe.model) or recipe.model.revision
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": revision})})


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def check_run_folder(recipe: Recipe, folder: RunFolder) -> Recipe | None:
    """Return the recipe of the run that the folder holds; None if it holds no run, or one that never made a step.

    Raises:
        UserError: the folder cannot be reached, or holds a run of a different recipe.
    """
    try:
        folder.pull(RECIPE_FILE)
    except OSError as error:
        raise UserError(
            f"cannot reach the run folder: {error}",
            field="checkpoint.storage",
            value=folder.uri,
            fix="check the path and your access to it",
        ) from None
    path = folder.path / RECIPE_FILE
    if not path.exists():
        return None
    # Parsing sets fields that are newer than the run to their defaults.
    run = parse_recipe(read_mapping(path), source=str(path))
    if _is_commit(run.model.revision) and not _is_commit(recipe.model.revision):
        recipe = pinned(recipe, run)  # the run replaced a branch, a tag or no revision by a commit
    saved, now = run.model_dump(mode="json"), recipe.model_dump(mode="json")
    differing = [
        f"{section}.{key}"
        for section, value in now.items()
        # Another objective has other options, and no section `orpo` unless it is ORPO; `objective.name` differs then.
        if isinstance(value, dict) and section in saved and section not in MAY_CHANGE
        for key in value
        if saved[section].get(key) != value[key] and f"{section}.{key}" not in MAY_CHANGE
    ]
    if differing and not folder.has(METRICS_FILE):
        return None  # the run ended before its first step, so nothing is lost
    if differing:
        raise UserError(
            f"the run folder holds a run of another recipe; the two differ in {', '.join(differing)}",
            field=folder.uri,
            fix="choose another name (name=...), or delete the folder",
        )
    return run
