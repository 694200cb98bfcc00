"""The recipes of rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.synthesis.outcome import Synthesized
from orpo_ray.synthesis.rounds import check_can_iterate, recipe_of_round, trained_on
from support.tiny_runs import tiny_recipe

MADE = Synthesized("/runs/x/round-2/data/train", 1, 1, {}, [], 2, 0, 1.0)

SERVED = {"engine": "server", "server": {"url": "http://localhost:8000/v1", "model": "m"}}


def recipe(tmp_path: Path, **sections: Any) -> Recipe:
    data = {"train": "rows.jsonl", "eval": "held.jsonl", "image_root": str(tmp_path)} | sections.pop("data", {})
    return tiny_recipe(tmp_path, "x", data=data, **sections)


def test_a_round_begins_with_the_model_of_the_round_before(tmp_path: Path) -> None:
    own = recipe(tmp_path, synthesize={"seed": 5})
    first, second = recipe_of_round(own, 1, own.model.id), recipe_of_round(own, 2, "/runs/x/round-1/final")
    assert (first.name, second.name) == ("x/round-1", "x/round-2")
    assert (first.model.id, second.model.id) == ("orpo-ray/tiny-smolvlm", "/runs/x/round-1/final")
    assert (first.synthesize.seed, second.synthesize.seed) == (5, 6)
    assert (first.eval.on_start, second.eval.on_start) == (True, False)
    for each in (first, second):
        assert each.synthesize.source == {"rows.jsonl": 1.0}
        assert each.synthesize.image_root == str(tmp_path)
    trained = trained_on(second, MADE)
    assert trained.data.train == {MADE.uri: 1.0}
    assert trained.data.eval == {"held.jsonl": 1.0}
    own_source = recipe_of_round(recipe(tmp_path, synthesize={"source": "other.jsonl"}), 1, "m")
    assert (own_source.synthesize.source, own_source.synthesize.image_root) == ({"other.jsonl": 1.0}, None)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"eval": {}}}, "data.eval: rounds are compared on held-out pairs"),
        ({"data": {"eval": {}, "eval_fraction": 0.1}}, "each round would hold out synthetic pairs"),
        ({"data": {"format": "plain"}}, "data.format: a round reads synthetic pairs"),
        ({"data": {"columns": {"chosen": "good"}}}, "data.columns: a round reads synthetic pairs"),
        ({"synthesize": SERVED | {"label": "reference"}}, "synthesize.engine: the server answers in every round"),
        ({"synthesize": SERVED | {"label": "judge", "judge": {"model": "j"}}}, "label judge does not ask the model"),
        ({"synthesize": SERVED | {"label": "corruption"}}, "label corruption does not ask the model"),
        ({"synthesize": {"model": "runs/a"}}, "synthesize.model: each round begins"),
        ({"checkpoint": {"storage": "s3://b/runs"}}, "checkpoint.storage: each round loads"),
    ],
)
def test_what_rounds_cannot_be_compared_with(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_can_iterate(recipe(tmp_path, **sections))
    check_can_iterate(recipe(tmp_path))
    check_can_iterate(recipe(tmp_path, data={"language": "script", "weights": {"language": {"Arabic": 2}}}))
    check_can_iterate(recipe(tmp_path, data={"language": "lang", "domain": "topic"}))
    check_can_iterate(recipe(tmp_path, synthesize=SERVED | {"label": "grounding"}))
    check_can_iterate(recipe(tmp_path, synthesize={"label": "reference"}))
