"""`orpo-ray init`: the recipes that come with the package. An installed package holds them in `orpo_ray/recipes`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from orpo_ray.errors import UserError

_INSTALLED, _CHECKOUT = Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes"


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe, with what the comment at its top says."""

    name: str
    text: str
    hardware: str
    memory: str


def shipped_recipes() -> list[ShippedRecipe]:
    """Return the recipes by name."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    return [_read(path) for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)]


def write_recipe(name: str, path: Path | None) -> Path:
    """Write a shipped recipe.

    Args:
        name: of the recipe.
        path: where to; by default `NAME.yaml` in this folder.

    Raises:
        UserError: there is no such recipe, or the file exists already.
    """
    recipes = {recipe.name: recipe for recipe in shipped_recipes()}
    if name not in recipes:
        raise UserError("no such recipe", field="NAME", value=name, fix=f"give one of: {', '.join(recipes)}")
    target = path or Path(f"{name}.yaml")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(recipes[name].text)
    except FileExistsError:
        raise UserError("the file exists already", field=str(target), fix="choose another with --output") from None
    except OSError as error:
        raise UserError(
            f"cannot write the recipe: {error}", field=str(target), fix="choose another path with --output"
        ) from None
    return target


def _read(path: Path) -> ShippedRecipe:
    """Read a recipe, and the first words of the paragraphs `Hardware:` and `Memory:` of its comment."""
    text = path.read_text(encoding="utf-8")
    comment = [
        line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())
    ]
    facts = {"Hardware": "", "Memory": ""}
    for place, line in enumerate(comment):
        name, _, words = line.partition(": ")
        if name in facts:
            facts[name] = re.split(r"\. | with the | predicted|, mostly|;|\.$", f"{words} {comment[place + 1]}")[0]
    return ShippedRecipe(path.stem, text, facts["Hardware"], facts["Memory"])
