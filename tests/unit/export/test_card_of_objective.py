"""The model card names the objective that a run was trained with."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from orpo_ray.config.load import parse_recipe
from orpo_ray.exporting.model_card import CardFacts, render_model_card


@pytest.mark.parametrize(
    ("objective", "link", "shown"),
    [
        ("orpo", "[ORPO](https://arxiv.org/abs/2403.07691)", None),
        ({"name": "simpo", "gamma": 0.5}, "[SimPO](https://arxiv.org/abs/2405.14734)", {"name": "simpo", "gamma": 0.5}),
    ],
    ids=["orpo", "simpo"],
)
def test_link_tag_and_recipe(objective: Any, link: str, shown: dict[str, Any] | None) -> None:
    raw = {"name": "a", "model": {"id": "org/base"}, "data": {"train": "t.jsonl"}, "objective": objective}
    recipe = parse_recipe(raw)
    card = render_model_card(CardFacts(recipe, "whole", {}, None, {}))
    _, metadata, body = card.split("---\n", 2)
    assert recipe.objective.name in yaml.safe_load(metadata)["tags"]
    assert f"preferences with {link}" in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]).get("objective") == shown
