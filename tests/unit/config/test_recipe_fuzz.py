"""Whatever a recipe holds, it is a recipe that can be written and read again, or one message."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings

from orpo_ray.config.load import apply_overrides, parse_recipe
from orpo_ray.config.yaml_text import parse_yaml
from orpo_ray.errors import UserError
from support.recipe_values import ANYTHING, recipes

VALID: list[bool] = []
LONGEST_MESSAGE = 20_000


def check(raw: dict[str, Any]) -> None:
    try:
        recipe = parse_recipe(raw)
    except UserError as error:
        check_message(error)
        VALID.append(False)
        return
    VALID.append(True)
    assert parse_recipe(parse_yaml(recipe.to_yaml(), "recipe")) == recipe
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def check_message(error: UserError) -> None:
    assert error.field
    assert len(str(error)) < LONGEST_MESSAGE


def check_override(key: str, value: Any) -> None:
    raw: dict[str, Any] = {"name": "a", "model": {"id": "m"}, "data": {"train": "t.jsonl"}}
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n")
    try:
        apply_overrides(raw, [f"{key}={text}"])
    except UserError as error:
        check_message(error)
        return
    check(raw)


@settings(max_examples=100, deadline=None)
@given(recipes())
def test_a_recipe_is_read_again_or_refused(raw: dict[str, Any]) -> None:
    check(raw)


@settings(max_examples=50, deadline=None)
@given(ANYTHING)
@pytest.mark.parametrize("key", ["optim.epochs", "tune.search", "data.train", "objective.name", "model"])
def test_an_override_is_read_again_or_refused(key: str, value: Any) -> None:
    check_override(key, value)


@pytest.mark.nightly
def test_many_recipes_are_read_again_or_refused() -> None:
    VALID.clear()
    settings(max_examples=1000, deadline=None)(given(recipes())(check))()
    # Otherwise this would be a test of error messages only.
    assert sum(VALID) > 0.05 * len(VALID)
