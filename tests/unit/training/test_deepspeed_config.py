"""What the recipe says reaches DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.training.deepspeed_config import deepspeed_config, loading_config, without_effect


def config_of(stage: int, num_trained: int = 7 * 10**9) -> dict[str, Any]:
    raw = {"name": "a", "model": {"id": "m"}, "data": {"train": "t"}, "deepspeed": {"zero_stage": stage}}
    return deepspeed_config(parse_recipe(raw), torch.bfloat16, 3584 * 2, num_trained)


@pytest.mark.parametrize(("stage", "overlaps"), [(1, False), (2, True), (3, True)])
def test_gradients_are_reduced_during_the_backward_pass_where_deepspeed_allows(stage: int, overlaps: bool) -> None:
    assert config_of(stage)["zero_optimization"]["overlap_comm"] == overlaps


def test_buckets_follow_the_model_and_never_exceed_what_is_trained() -> None:
    assert config_of(2)["zero_optimization"]["reduce_bucket_size"] == 7168**2
    assert config_of(2, 5_000_000)["zero_optimization"]["reduce_bucket_size"] == 5_000_000


def test_what_is_offloaded_reaches_deepspeed_and_the_loading_of_the_model() -> None:
    options = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}
    recipe = parse_recipe({"name": "a", "model": {"id": "m"}, "data": {"train": "t"}, "deepspeed": options})
    for config in (loading_config(recipe, torch.float32), deepspeed_config(recipe, torch.float32, 8, 8)):
        zero = config["zero_optimization"]
        assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    line = without_effect(recipe, torch.device("cpu"))
    assert line is not None
    assert "deepspeed.offload_optimizer and deepspeed.offload_param: no effect" in line
    assert without_effect(recipe, torch.device("cuda")) is None
    assert "offload_optimizer" not in config_of(3)["zero_optimization"]
