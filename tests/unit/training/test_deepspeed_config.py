"""What the recipe says reaches DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.training.deepspeed_config import check_config, deepspeed_config, loading_config, without_effect


def recipe_with(section: dict[str, Any]) -> Recipe:
    return parse_recipe({"name": "a", "model": {"id": "m"}, "data": {"train": "t"}, "deepspeed": section})


def config_of(stage: int, num_trained: int = 7 * 10**9) -> dict[str, Any]:
    return deepspeed_config(recipe_with({"zero_stage": stage}), torch.bfloat16, 3584 * 2, num_trained)


@pytest.mark.parametrize(("stage", "overlaps"), [(1, False), (2, True), (3, True)])
def test_gradients_are_reduced_during_the_backward_pass_where_deepspeed_allows(stage: int, overlaps: bool) -> None:
    assert config_of(stage)["zero_optimization"]["overlap_comm"] == overlaps


def test_buckets_follow_the_model_and_never_exceed_what_is_trained() -> None:
    assert config_of(2)["zero_optimization"]["reduce_bucket_size"] == 7168**2
    assert config_of(2, 5_000_000)["zero_optimization"]["reduce_bucket_size"] == 5_000_000


def test_what_is_offloaded_reaches_deepspeed_and_the_loading_of_the_model() -> None:
    recipe = recipe_with({"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"})
    for config in (loading_config(recipe, torch.float32), deepspeed_config(recipe, torch.float32, 8, 8)):
        zero = config["zero_optimization"]
        assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    line = without_effect(recipe, torch.device("cpu"))
    assert line is not None
    assert "deepspeed.offload_optimizer and deepspeed.offload_param: no effect" in line
    assert without_effect(recipe, torch.device("cuda")) is None
    assert "offload_optimizer" not in config_of(3)["zero_optimization"]


def test_further_settings_reach_deepspeed_beside_those_of_the_recipe() -> None:
    more = {"zero_optimization": {"sub_group_size": 1000, "overlap_comm": False}, "steps_per_print": 10}
    recipe = recipe_with({"zero_stage": 3, "config": more})
    config = deepspeed_config(recipe, torch.float32, 8, 8)
    check_config(config, recipe)
    zero = config["zero_optimization"]
    assert (zero["sub_group_size"], zero["overlap_comm"], zero["stage"]) == (1000, False, 3)
    assert config["steps_per_print"] == 10
    assert config["gradient_clipping"] == 1.0
    loading = loading_config(recipe, torch.float32)
    assert loading["zero_optimization"] == {"stage": 3, **more["zero_optimization"]}
    assert "steps_per_print" not in loading


def test_a_setting_that_deepspeed_refuses_is_one_message() -> None:
    recipe = recipe_with({"zero_stage": 3, "config": {"zero_optimization": {"sub_group_sise": 1}}})
    with pytest.raises(UserError, match=r"deepspeed\.config: DeepSpeed refuses these settings: .*sub_group_sise"):
        check_config(deepspeed_config(recipe, torch.float32, 8, 8), recipe)
