"""`orpo-ray convert`: turn the config of another trainer into a recipe, and list what has no counterpart."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.convert.defaults import DEFAULTS
from orpo_ray.convert.draft import Draft
from orpo_ray.convert.projects import MODELS, PROJECTS, project_of
from orpo_ray.convert.reading import GIVE, read_config
from orpo_ray.errors import UserError

_NO_DATA = "put your data here"
_NO_MODEL = "put-your-model-here"
_SHELL_VARIABLE = re.compile(r"\$[\w{(@*]")


def convert_config(path: Path) -> str:
    """Convert a config of TRL, LLaMA-Factory, ms-swift or axolotl.

    Args:
        path: a YAML file, or a shell script with the arguments of a command.

    Returns:
        A recipe as YAML. Comments at its top list every field that was not carried over, with the reason. Fields that
        their config leaves out have the defaults of their project.

    Raises:
        UserError: the file cannot be read, or is no config of these projects, or no recipe can say what it says.
    """
    found = read_config(path)
    theirs = found.fields
    project = project_of(theirs)
    if project is None:
        raise UserError(
            "this is no config of TRL, LLaMA-Factory, ms-swift or axolotl that names a model",
            field=str(path),
            value=", ".join(map(str, list(theirs)[:8])) or None,
            fix=GIVE,
        )
    draft = Draft(theirs, defaults=dict(DEFAULTS[project]), trainer=found.trainer)
    variables = _list_variables(draft)
    PROJECTS[project](draft, path.parent, found.gpus)
    draft.drop_rest()
    if not draft.recipe.get("data", {}).get("train"):
        draft.note("data.train", _NO_DATA, "their config names no dataset that can be carried over")
        draft.put("data.train", "pairs.jsonl")
    if MODELS & variables:
        draft.put("model.id", _NO_MODEL)
    _drop_evaluation_without_pairs(draft)
    _check(draft, path)
    return _as_text(draft, project, path)


def _list_variables(draft: Draft) -> set[str]:
    """List fields whose values only the shell knows, and return their names."""
    found = set()
    for name, value in draft.theirs.items():
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, str) and _SHELL_VARIABLE.search(part) for part in parts):
            draft.note(name, value, "a variable of the shell; put in its value")
            found.add(name)
    for name in found:
        del draft.theirs[name]
    return found


def _check(draft: Draft, path: Path) -> None:
    """Raise UserError if the recipe is not valid. Says which of their fields to correct."""
    try:
        parse_recipe(draft.recipe, source=f"the recipe made of {path}")
    except UserError as error:
        wrong = [
            f"{theirs} ({ours})"
            for ours, theirs in draft.origins.items()
            if re.search(rf"(?m)^(?:  - )?{re.escape(ours)}:", error.problem)
        ]
        fix = f"correct {', '.join(wrong)} in {path.name}" if wrong else f"correct {path.name}"
        raise UserError(error.problem, field=error.field, fix=fix) from None


def _drop_evaluation_without_pairs(draft: Draft) -> None:
    """Their evaluation can run on a split that the recipe does not have."""
    data = draft.recipe.get("data", {})
    every = draft.recipe.get("eval", {}).get("every_steps")
    if every is not None and not data.get("eval") and not data.get("eval_fraction"):
        del draft.recipe["eval"]
        draft.note("eval_steps", every, "there are no held-out pairs; set data.eval or data.eval_fraction")


def _as_text(draft: Draft, project: str, path: Path) -> str:
    comment = [f"Converted from {path.name}, a config of {project}.", f"What it leaves out has {project}'s defaults."]
    if draft.notes:
        comment += ["", "Not carried over:", *(f"  {note}" for note in draft.notes)]
    recipe = {name: draft.recipe[name] for name in Recipe.model_fields if name in draft.recipe}
    # A comment must not end early: names and values of their config may hold line breaks, also those of Unicode.
    lines = [f"# {' '.join(line.splitlines())}".rstrip() for line in comment]
    return "\n".join(lines) + "\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
