"""Several adapters side by side, against peft with one of them at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from orpo_ray.config.schema import LoraConfig, ModelConfig
from orpo_ray.errors import OrpoRayError
from orpo_ray.model.loading import load_model
from orpo_ray.model.lora import adapter_weights, add_adapter_beside
from orpo_ray.model.stacked_lora import AdapterStack

RANKS = {"default": 4, "second": 8, "third": 2}


class Base(nn.Module):
    """Two linear layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 5, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.second(torch.tanh(self.first(states)))
        return hidden


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Three adapters of different ranks and scales, none of which is at its first weights."""
    import peft

    torch.manual_seed(0)
    model: Any = None
    base = Base().to(dtype)
    for number, (name, rank) in enumerate(RANKS.items()):
        config = peft.LoraConfig(
            r=rank, lora_alpha=3 + number, target_modules=["first", "second"], init_lora_weights=False, **options
        )
        if model is None:
            model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    return model


def alone(model: Any, name: str, states: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """peft's own output of one adapter, and the gradients of its weights for the sum of squares."""
    model.set_adapter(name)
    out = model(states)
    return out, list(torch.autograd.grad(out.square().sum(), list(adapter_weights(model, name).values())))


@pytest.mark.parametrize("names", [list(RANKS), ["third", "default"], ["second"]])
def test_each_copy_runs_through_its_adapter(names: list[str]) -> None:
    model = adapted()
    states = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(1))
    expected = {name: alone(copy.deepcopy(model), name, states) for name in RANKS}
    stack = AdapterStack(model)
    stack.use(names)
    outs = model(states.repeat(1, len(names), 1)).chunk(len(names), dim=1)
    sum(out.square().sum() for out in outs).backward()
    for name, out in zip(names, outs, strict=True):
        torch.testing.assert_close(out, expected[name][0], rtol=1e-5, atol=1e-5)
        for weight, gradient in zip(adapter_weights(model, name).values(), expected[name][1], strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-5)
    for name in set(RANKS) - set(names):
        assert all(weight.grad is None for weight in adapter_weights(model, name).values()), name


def test_one_adapter_does_not_disturb_another() -> None:
    model = adapted()
    stack = AdapterStack(model)
    states = torch.randn(1, 3, 6)
    stack.use(["default", "second"])
    before, _ = model(states.repeat(1, 2, 1)).chunk(2, dim=1)
    with torch.no_grad():
        for weight in adapter_weights(model, "second").values():
            weight.fill_(float("nan"))
    after, broken = model(states.repeat(1, 2, 1)).chunk(2, dim=1)
    assert torch.equal(before, after)
    assert broken.isnan().any()


def test_layers_that_are_more_than_two_matrices_are_refused() -> None:
    with pytest.raises(OrpoRayError, match="plain LoRA"):
        AdapterStack(adapted(use_dora=True))


def test_a_further_adapter_begins_as_the_only_one_would() -> None:
    def first_weights(rank: int, seed: int) -> dict[str, torch.Tensor]:
        model = load_model(tiny(rank), torch.device("cpu"), seed)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    model = load_model(tiny(4), torch.device("cpu"), 0)
    add_adapter_beside(model, "beside", LoraConfig(r=8, alpha=5), seed=3)
    for name, rank, seed in (("default", 4, 0), ("beside", 8, 3)):
        expected, found = first_weights(rank, seed), adapter_weights(model, name)
        assert list(found) == list(expected)
        assert all(torch.equal(found[path], expected[path]) for path in expected), name


def tiny(rank: int) -> ModelConfig:
    return ModelConfig(id="orpo-ray/tiny-smolvlm", lora=LoraConfig(r=rank))
