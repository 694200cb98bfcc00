"""The space of a search: values of any field, checked against the recipe's types and rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.load import parse_recipe
from orpo_ray.errors import UserError
from orpo_ray.sweep.run import why_not_comparable
from orpo_ray.sweep.space import Dimension, make_space, with_params
from support.tiny_runs import tiny_recipe


def space_of(search: dict[str, Any], **sections: Any) -> list[Dimension]:
    return list(make_space(tiny_recipe(Path("runs"), "x", tune={"search": search}, **sections)))


def test_values_have_the_type_of_their_field() -> None:
    rank, rate, dora, data = space_of(
        {
            "model.lora.r": {"low": 4, "high": 64},
            "optim.learning_rate": {"choices": ["1e-4", 1]},
            "model.lora.use_dora": {"choices": [True, False]},
            "data.train": {"choices": ["a.jsonl", ["a.jsonl", "b.jsonl"]]},
        }
    )
    assert [rank.value(unit) for unit in (0.0, 0.5, 1.0)] == [4, 16, 64]
    assert all(isinstance(rank.value(unit / 10), int) for unit in range(11))
    assert rate.choices == (1e-4, 1.0)
    assert dora.choices == (True, False)
    here = str(Path("a.jsonl").resolve())
    assert data.choices[0] == {here: 1.0}
    assert data.labels == ("a.jsonl", "a.jsonl, b.jsonl")


def test_a_position_and_its_value_belong_together() -> None:
    for dimension in space_of(
        {
            "orpo.beta": {"low": 0.01, "high": 1},
            "optim.weight_decay": {"low": 0, "high": 0.2, "log": False},
            "model.dtype": {"choices": ["auto", "float32", "bfloat16"]},
        }
    ):
        for value in dimension.grid():
            assert dimension.value(dimension.unit(value)) == pytest.approx(value)


def test_a_grid_has_the_bounds_and_all_choices() -> None:
    space = make_space(
        tiny_recipe(
            Path("runs"),
            "x",
            tune={"search": {"orpo.beta": {"low": 0.01, "high": 1, "points": 3}, "model.lora.r": {"choices": [8, 16]}}},
        )
    )
    points = [(params["orpo.beta"], params["model.lora.r"]) for params in space.grid()]
    assert points == [(pytest.approx(beta), r) for beta in (0.01, 0.1, 1.0) for r in (8, 16)]


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"orpo.beta": {"low": -1, "high": 1, "log": False}}, "tune.search.orpo.beta: the recipe refuses -1"),
        ({"orpo.beta": {"choices": [True]}}, "Input should be a valid number, not true or false"),
        ({"model.lora.r": {"low": 0.5, "high": 8}}, "tune.search.model.lora.r: the recipe refuses 0.5"),
        ({"model.lora.rank": {"choices": [8]}}, "did you mean 'r'?"),
        ({"model.dtype": {"low": 1, "high": 2}}, "tune.search.model.dtype: the recipe refuses 1"),
        ({"model.dtype": {"choices": ["float16"]}}, "Input should be 'auto', 'float32' or 'bfloat16'"),
        ({"optim.learning_rate.x": {"choices": [1]}}, "'learning_rate' holds a value, so it cannot have keys"),
        ({"name": {"choices": ["a"]}}, "'name' cannot be searched: it names the run"),
        ({"eval.max_pairs": {"choices": [8]}}, "trials that are measured in different ways cannot be compared"),
        ({"data.eval": {"choices": ["a"]}}, "trials that are measured on different pairs cannot be compared"),
        ({"model.id": {"choices": ["./nowhere"]}}, "no such folder"),
        (
            {"deepspeed.zero_stage": {"choices": [2, 3]}, "model.quantization": {"choices": [{}]},
             "model.lora": {"choices": [{"use_dora": True}]}},
            "the recipe refuses",
        ),
        (
            {"deepspeed.offload_param": {"choices": ["none"]}, "deepspeed.zero_stage": {"choices": [0, 3]},
             "deepspeed.offload_optimizer": {"choices": ["none"]}, "optim.pairs_per_step": {"choices": [0]}},
            "tune.search.optim.pairs_per_step: the recipe refuses 0",
        ),
    ],
)  # fmt: skip
def test_what_the_recipe_refuses_is_refused_before_anything_starts(search: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        space_of(search)
    assert expected in str(error.value)
    assert error.value.fix


def test_a_combination_that_breaks_a_rule_is_named() -> None:
    search = {"deepspeed.zero_stage": {"choices": [2, 3]}, "model.lora.use_dora": {"choices": [False, True]}}
    with pytest.raises(UserError) as error:
        space_of(search, model={"lora": {}, "quantization": {}})
    assert "a combination of the search (deepspeed.zero_stage=3, model.lora.use_dora=True)" in str(error.value)


def test_a_trial_has_the_values_that_it_was_given() -> None:
    recipe = parse_recipe(tiny_recipe(Path("runs"), "x").model_dump(mode="json"))
    trial = with_params(recipe, {"model.lora.r": 8, "optim.learning_rate": 1e-5}, "x/trials/0000")
    assert trial.name == "x/trials/0000"
    assert trial.model.lora is not None
    assert trial.model.lora.r == 8
    assert trial.optim.learning_rate == 1e-5


def test_a_searched_field_that_the_metric_depends_on_by_definition_is_named() -> None:
    keys = ["orpo.beta", "optim.learning_rate"]
    assert "eval/rewards/margins depends on orpo.beta by" in (why_not_comparable("eval/rewards/margins", keys) or "")
    assert "depends on orpo.beta and orpo.anchor by" in (why_not_comparable("eval/loss", [*keys, "orpo.anchor"]) or "")
    assert why_not_comparable("eval/rewards/margins", ["orpo.anchor"]) is None
    assert why_not_comparable("eval/rewards/accuracies", keys) is None
    assert why_not_comparable("eval/rewards/margins", ["optim.learning_rate", "optim.adam_beta1"]) is None
