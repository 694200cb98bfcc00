"""Several adapters on one base model, against each of them alone, for every family that can."""

from __future__ import annotations

import copy

import pytest
import torch

from orpo_ray.config.schema import LoraConfig
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.errors import UserError
from orpo_ray.model.lora import adapter_weights, add_adapter_beside
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.multi_adapter import MultiAdapterModel, OneAdapter, divided
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from support.pairs_by_hand import make_row, run_as, tiny_pair_model
from support.trees_by_hand import all_kinds

NAMES = ["default", "second", "third"]
ROW = [(1, 6, 12, 9), (2, 5, 4, 7)]


def several_adapters(family: str) -> PairModel:
    """A tiny model with three adapters of different ranks, none of which is at its first weights."""
    model = tiny_pair_model(family, lora=True)
    run_as(model, "shared_prefix")
    for number, name in enumerate(NAMES[1:], 1):
        add_adapter_beside(model.model, name, LoraConfig(r=4 + 2 * number, alpha=2 + number), seed=number)
        weights = adapter_weights(model.model, name)
        with torch.no_grad():
            for path, weight in weights.items():
                if "lora_B" in path:
                    weight.normal_(std=0.1)
    return model.train()


def batch_of(model: PairModel, family: str, with_images: bool = True) -> PairBatch:
    row = [(images if with_images else 0, *lengths) for images, *lengths in ROW]
    return build_batch(make_row(family, row), "response", "shared_prefix", collate=model.family.collate)  # type: ignore[arg-type]


def loss_of(logps: PairLogps, number: int) -> torch.Tensor:
    """Each adapter has its own beta."""
    pairs = len(logps.chosen)
    loss, _ = ORPO(0.1 + number).loss(logps, torch.ones(pairs), Normaliser(pairs))
    return loss


def check(model: PairModel, batch: PairBatch, tokens_at_once: int) -> None:
    expected = {}
    for number, name in enumerate(NAMES):
        alone = copy.deepcopy(model)
        alone.model.set_adapter(name)  # type: ignore[operator]
        logps = alone(batch)
        loss_of(logps, number).backward()
        expected[name] = logps, [weight.grad for weight in adapter_weights(alone.model, name).values()]
    adapters = MultiAdapterModel(model, tokens_at_once)
    adapters.stack()
    found: dict[str, PairLogps] = {}
    for group in adapters.groups(batch, NAMES):
        torch.stack([loss_of(logps, NAMES.index(name)) for name, logps in group.items()]).sum().backward()
        found |= group
    assert list(found) == NAMES
    for name, (logps, gradients) in expected.items():
        for sums, own in zip(vars(logps).values(), vars(found[name]).values(), strict=True):
            torch.testing.assert_close(own, sums, rtol=1e-5, atol=1e-5)
        for weight, gradient in zip(adapter_weights(model.model, name).values(), gradients, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["smolvlm", "llava_next", "qwen2_5_vl", "gemma3", "paligemma"])
def test_equals_each_adapter_alone(family: str) -> None:
    model = several_adapters(family)
    check(model, batch_of(model, family), tokens_at_once=2**20)


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_trees_equal_each_adapter_alone(family: str) -> None:
    model = several_adapters(family)
    pairs, collate = all_kinds(family), model.family.collate
    batch = build_batch(pairs, "prompt+response", "shared_prefix", collate=collate, shares="images")
    check(model, batch, tokens_at_once=2**20)


def test_groups_and_text_alone() -> None:
    model = several_adapters("smolvlm")
    batch = batch_of(model, "smolvlm", with_images=False)
    check(model, batch, tokens_at_once=2 * batch.input_ids.numel())


def test_a_forward_pass_looks_at_the_images_once() -> None:
    model = several_adapters("smolvlm")
    calls: list[int] = []
    vision = model.model.get_base_model().model.vision_model  # type: ignore[operator]
    vision.register_forward_hook(lambda *_: calls.append(1))
    batch = batch_of(model, "smolvlm")
    adapters = MultiAdapterModel(model, tokens_at_once=1)
    adapters.stack()
    with torch.no_grad():
        found = [logps for group in adapters.groups(batch, NAMES) for logps in group.values()]
        assert len(found) == 3
        assert len(calls) == 1
        second = OneAdapter(adapters, "second")(batch)
    torch.testing.assert_close(second.chosen, found[1].chosen, rtol=1e-5, atol=1e-5)


def test_groups_are_of_equal_size_and_within_the_budget() -> None:
    assert divided(list("abcdefgh"), 100, 800) == [list("abcdefgh")]
    assert divided(list("abcdefgh"), 100, 350) == [list("ab"), list("cde"), list("fgh")]
    assert divided(list("ab"), 500, 100) == [["a"], ["b"]]


def test_models_that_cannot_are_refused() -> None:
    deepstack = tiny_pair_model("qwen3_vl", lora=True)
    run_as(deepstack, "shared_prefix")
    with pytest.raises(UserError, match="image features"):
        MultiAdapterModel(deepstack, 1)
    full = tiny_pair_model("smolvlm")
    run_as(full, "shared_prefix")
    with pytest.raises(UserError, match="outside the layers of the language model"):
        MultiAdapterModel(full, 1)
    padded = tiny_pair_model("smolvlm", lora=True)
    run_as(padded, "concatenated")
    with pytest.raises(UserError, match="concatenated"):
        MultiAdapterModel(padded, 1)
