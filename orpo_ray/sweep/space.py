"""The space of a search: which recipe fields take which values, all checked before any trial starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel

from orpo_ray.config.load import parse_recipe, set_field
from orpo_ray.config.recipe import Recipe
from orpo_ray.config.tune_schema import SearchRange
from orpo_ray.errors import UserError, preview

COMBINATIONS = 512
"""Most combinations of values that are checked against the recipe's rules."""
MAX_GRID = 1000
# Their values are made absolute, since a trial runs in another working directory.
PATHS = ("data.train", "data.image_root", "model.id", "model.vision_cache")

Params = dict[str, Any]
"""Recipe field -> value of one trial."""


@dataclass(frozen=True)
class Dimension:
    """One field of the space: a range, or choices."""

    key: str
    """Recipe key, such as `optim.learning_rate`."""
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    is_whole: bool = False
    """Whether the field takes whole numbers only."""
    points: int = 3
    """Values of a range in a grid."""
    choices: tuple[Any, ...] = ()
    """Values to choose from; empty for a range."""
    labels: tuple[str, ...] = ()
    """Of the choices, as the user wrote them."""

    def value(self, unit: float) -> Any:
        """Return the value at a position from 0 to 1 of the space."""
        if self.choices:
            return self.choices[min(int(unit * len(self.choices)), len(self.choices) - 1)]
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = low + unit * (high - low)
        at = min(max(math.exp(at) if self.log else at, self.low), self.high)
        return round(at) if self.is_whole else at

    def unit(self, value: Any) -> float:
        """Return the position of a value, from 0 to 1."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, float(value)))
        return min(max((at - low) / (high - low), 0.0), 1.0)

    def grid(self) -> list[Any]:
        """Return the values of a grid."""
        if self.choices:
            return list(self.choices)
        return list(dict.fromkeys(self.value(place / (self.points - 1)) for place in range(self.points)))

    def extremes(self) -> Sequence[Any]:
        """Return the values that the recipe's types and rules can refuse: all choices, or both bounds."""
        return self.choices or (self.value(0.0), self.value(1.0))

    def label(self, value: Any) -> str:
        """Return a value as tables and pages show it."""
        if self.choices:
            return self.labels[self.choices.index(value)]
        return f"{value}" if self.is_whole else f"{value:.3g}"


@dataclass(frozen=True)
class Space:
    """All fields that a search changes."""

    dimensions: tuple[Dimension, ...]

    def __iter__(self) -> Iterator[Dimension]:
        return iter(self.dimensions)

    def __len__(self) -> int:
        return len(self.dimensions)

    @property
    def keys(self) -> list[str]:
        """The recipe keys."""
        return [each.key for each in self.dimensions]

    def params(self, units: Sequence[float]) -> Params:
        """Return the values at a point of the unit cube."""
        return {each.key: each.value(unit) for each, unit in zip(self.dimensions, units, strict=True)}

    def grid(self) -> list[Params]:
        """Return all combinations of a grid. Raises UserError if there are too many."""
        values = [each.grid() for each in self.dimensions]
        if (count := math.prod(map(len, values))) > MAX_GRID:
            raise UserError(
                f"the grid has {count:,} points; at most {MAX_GRID:,} are possible",
                field="tune.search",
                fix="lower the points of its ranges, or set tune.searcher: random",
            )
        return [dict(zip(self.keys, point, strict=True)) for point in itertools.product(*values)]

    def labels(self, params: Mapping[str, Any]) -> list[str]:
        """Return the values of a trial as tables show them."""
        return [each.label(params[each.key]) for each in self.dimensions]


def make_space(recipe: Recipe) -> Space:
    """Return the space of a recipe's search.

    Raises:
        UserError: a field does not exist or cannot be searched, a value does not have its type or bounds, or a
            combination of values breaks a rule of recipes.
    """
    space = Space(tuple(_dimension(recipe, key, found) for key, found in recipe.search.items()))
    _check_combinations(recipe, space)
    return space


def trials_to_begin(recipe: Recipe, space: Space) -> int:
    """Return the number of trials of a sweep; with population-based training, the size of the population."""
    return len(space.grid()) if recipe.tune.searcher == "grid" else recipe.tune.num_trials


def with_params(recipe: Recipe, params: Mapping[str, Any], name: str) -> Recipe:
    """Return the recipe of a trial. Raises UserError."""
    raw = recipe.model_dump(mode="json") | {"name": name}
    for key, value in params.items():
        set_field(raw, key, value)
    return parse_recipe(raw)


def short_keys(keys: Sequence[str]) -> list[str]:
    """Return the last part of each key, or more of it where two keys end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]


def _dimension(recipe: Recipe, key: str, found: SearchRange) -> Dimension:
    if not found.choices:
        assert found.low is not None
        assert found.high is not None
        low, high = (_checked(recipe, key, _whole(value)) for value in (found.low, found.high))
        if isinstance(low, bool) or not isinstance(low, int | float):
            raise UserError(
                f"'{key}' is no number, so it has no range", field="tune.search", fix="give its values as choices"
            )
        is_whole = isinstance(low, int)
        return Dimension(key, low, high, found.log, is_whole, found.points)
    values = [_checked(recipe, key, value) for value in found.choices]
    unique = {repr(value): place for place, value in reversed(list(enumerate(values)))}
    places = sorted(unique.values())
    labels = tuple(_label(found.choices[place]) for place in places)
    return Dimension(key, choices=tuple(values[place] for place in places), labels=labels)


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _label(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | dict):
        return ", ".join(str(each) for each in value) or "none"
    return "none" if value is None else str(value)


def _checked(recipe: Recipe, key: str, value: Any) -> Any:
    """Return a value as the recipe holds it.

    Raises:
        UserError: the recipe refuses it.
    """
    try:
        changed = with_params(recipe, {key: value}, recipe.name)
        changed = changed.with_absolute_paths() if key in PATHS else changed
    except UserError as error:
        problem = error.problem.removeprefix(f"{key}: ")
        raise UserError(
            f"the recipe refuses {preview(value)} for {key}: {problem}",
            field=f"tune.search.{key}",
            fix=error.fix or "correct the key or the value; the recipe reference lists all fields and their bounds",
        ) from None
    return _field(changed, key)


def _field(recipe: Recipe, key: str) -> Any:
    """Return a field of a recipe, in JSON's types."""
    found: Any = recipe
    for part in key.split("."):
        found = getattr(found, part) if isinstance(found, BaseModel) else found[part]
    return found.model_dump(mode="json") if isinstance(found, BaseModel) else found


def _check_combinations(recipe: Recipe, space: Space) -> None:
    """Check combinations of values against the rules of recipes: all, or a sample of many. Raises UserError."""
    values = [each.extremes() for each in space]
    count = math.prod(map(len, values))
    if count <= COMBINATIONS:
        points: Iterator[Sequence[Any]] = itertools.product(*values)
    else:
        rng = np.random.default_rng(0)
        points = ([each[int(rng.integers(len(each)))] for each in values] for _ in range(COMBINATIONS))
    for point in points:
        params = dict(zip(space.keys, point, strict=True))
        try:
            with_params(recipe, params, recipe.name)
        except UserError as error:
            shown = ", ".join(f"{key}={preview(value)}" for key, value in params.items())
            raise UserError(
                f"the recipe refuses a combination of the search ({shown}): {error.problem}",
                field="tune.search",
                fix="leave out one of these values, or search them in two searches",
            ) from None
