"""Whether a run folder holds this recipe's run already, and with which commit of the model it began."""

from __future__ import annotations

import re

from orpo_ray.config.load import parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.model.loading import commit_of
from orpo_ray.storage.run_folder import METRICS_FILE, RECIPE_FILE, RunFolder

# May differ between a run's first start and its resumption: they change how it runs, not what it computes.
MAY_CHANGE = ("scaling", "checkpoint", "tracking", "eval", "tune", "model.vision_cache")


def pinned(recipe: Recipe, saved: Recipe | None) -> Recipe:
    """The recipe with its model's revision as a commit, where it comes from the hub: the saved run's, if there is one.

    A branch may have moved on since; a run ends with the weights and the processor that it began with.
    """
    revision = saved.model.revision if saved is not None else commit_of(recipe.model) or recipe.model.revision
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": revision})})


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def check_run_folder(recipe: Recipe, folder: RunFolder) -> Recipe | None:
    """The recipe of the run that the folder holds already; raises UserError if it is another one's."""
    try:
        folder.pull(RECIPE_FILE)
    except OSError as error:
        raise UserError(f"cannot be reached: {error}", field="checkpoint.storage", value=folder.uri) from None
    path = folder.path / RECIPE_FILE
    if not path.exists():
        return None
    # Parsed, so that a key which is newer than the run stands at its default.
    run = parse_recipe(read_mapping(path), source=str(path))
    if _is_commit(run.model.revision) and not _is_commit(recipe.model.revision):
        recipe = pinned(recipe, run)  # as the run itself was: a branch, a tag or none became a commit
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
        return None  # it ended before its first step: nothing is lost
    if differing:
        raise UserError(
            f"this run folder holds a run of another recipe; they differ in {', '.join(differing)}",
            field=folder.uri,
            fix="give the run another name (name=...), or delete the folder",
        )
    return run
