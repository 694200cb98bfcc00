"""A base model that is kept for the next run is the model that would be loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.model.base_models import BaseModels
from orpo_ray.model.loading import load_base, load_model

CPU = torch.device("cpu")
LORA: dict[str, Any] = {"id": "orpo-ray/tiny-smolvlm", "lora": {"r": 4}}


def train(model: torch.nn.Module) -> None:
    """Change every weight that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"lora": {"r": 4, "modules_to_save": ["connector"]}},
        {"lora": {"r": 4, "use_dora": True}},
        {"quantization": {}},
        {"freeze": ["vision"], "fused_layers": True, "lora": {"r": 4, "target_modules": ["q_proj", "connector"]}},
        {"id": "orpo-ray/tiny-llava", "gradient_checkpointing": "full"},
    ],
    ids=["adapters", "modules in full", "DoRA", "4 bits", "fused", "checkpointed"],
)
def test_after_a_run_it_is_as_it_was(section: dict[str, Any]) -> None:
    model_config, bases = ModelConfig.model_validate(LORA | section), BaseModels()
    first = load_model(model_config, CPU, 0, bases)
    pointers = {name: weight.data_ptr() for name, weight in first.named_parameters() if not weight.requires_grad}
    train(first)
    del first
    second, fresh = load_model(model_config, CPU, 1, bases), load_model(model_config, CPU, 1)
    assert {name: second.get_parameter(name).data_ptr() for name in pointers} == pointers
    expected = fresh.state_dict()
    found = second.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    trained = [[name for name, each in model.named_parameters() if each.requires_grad] for model in (second, fresh)]
    assert trained[0] == trained[1]
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (second, fresh)]
    assert kinds[0] == kinds[1]


def test_only_a_base_of_adapters_is_kept_and_only_for_the_same_model() -> None:
    loaded: list[str] = []

    def load(model_config: ModelConfig, device: torch.device) -> torch.nn.Module:
        loaded.append(model_config.dtype)
        return load_base(model_config, device)

    bases = BaseModels()
    for changed in ({}, {"lora": {"r": 8}}, {"dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"lora": None}, {}, {}):
        bases.get(ModelConfig.model_validate(LORA | changed), CPU, load)
    assert loaded == ["auto", "bfloat16", "auto", "auto"]
