"""`orpo-ray convert`: turn the config of another trainer into a recipe, and list what has no counterpart."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.config.yaml_text import parse_yaml, read_text
from orpo_ray.convert.defaults import DEFAULTS
from orpo_ray.convert.draft import Draft
from orpo_ray.convert.projects import PROJECTS, project_of
from orpo_ray.errors import UserError

_NO_DATA = "put your data here"
_GIVE = "give the YAML file or the shell script that you start their training with"


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
    theirs, gpus = read_config(path)
    project = project_of(theirs)
    if project is None:
        raise UserError(
            "this is no config of TRL, LLaMA-Factory, ms-swift or axolotl that names a model",
            field=str(path),
            value=", ".join(map(str, list(theirs)[:8])),
            fix=_GIVE,
        )
    draft = Draft(theirs, defaults=dict(DEFAULTS[project]))
    PROJECTS[project](draft, path.parent, gpus)
    draft.drop_rest()
    if not draft.recipe.get("data", {}).get("train"):
        draft.note("data.train", _NO_DATA, "their config names no dataset that can be carried over")
        draft.put("data.train", "pairs.jsonl")
    _drop_evaluation_without_pairs(draft)
    parse_recipe(draft.recipe, source=f"the recipe made of {path}")
    return _as_text(draft, project, path)


def read_config(path: Path) -> tuple[dict[str, Any], int]:
    """Read the fields of a config, and on how many GPUs it runs as far as it says.

    Raises:
        UserError: the file cannot be read.
    """
    text = read_text(path)
    if path.suffix in (".sh", ".bash"):
        return _read_script(text)
    raw = parse_yaml(text, field=str(path))
    if not isinstance(raw, dict):
        raise UserError("a config must be a mapping", field=str(path), value=type(raw).__name__, fix=_GIVE)
    return {str(name): value for name, value in raw.items()}, 1


def _read_script(text: str) -> tuple[dict[str, Any], int]:
    """Read `--name value` arguments, and variables that say how many GPUs there are."""
    found = re.search(r"(?i)\b(?:nproc_per_node|num_processes|nproc)[= ]+(\d+)", text)
    gpus = int(found[1]) if found else 1
    text = re.sub(r"\$\(expr (\d+) / \$\w+\)", lambda match: str(int(match[1]) // gpus), text.replace("\\\n", " "))
    theirs: dict[str, Any] = {}
    name = None
    for word in shlex.split(text, comments=True):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            theirs[name] = value or True
        elif name is not None and theirs[name] is True:
            theirs[name] = word
        elif name is not None and isinstance(theirs[name], str | list):
            theirs[name] = [*(theirs[name] if isinstance(theirs[name], list) else [theirs[name]]), word]
    return theirs, gpus


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
    # A comment must not end early: names and values of their config may hold line breaks.
    lines = [f"# {line}".rstrip().replace("\r", " ").replace("\n", " ") for line in comment]
    return "\n".join(lines) + "\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
