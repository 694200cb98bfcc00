"""Pairs with other images: a branch of the packed row, a third row of the concatenated layout, the same result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import build_batch
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.pairs_by_hand import CROSS, assert_equal, gradients, make_pair, relative_distance, run, tiny_pair_model

OBJECTIVE = ORPO(0.5, image_beta=0.7, anchor=1.5)
SHARING = [family for family in TINY_FAMILIES if family not in CROSS]
# Full fine-tuning, LoRA and recomputation; what is slow to combine for every family is left to the nightly run.
MODES: list[tuple[bool, Checkpointing]] = [(False, "none"), (True, "none"), (False, "full"), (True, "full")]


def contrasted_pairs(family: str) -> list[EncodedPair]:
    """Four pairs: plain, with other images, with other and rejected images, without images."""
    rng = np.random.default_rng(5)
    pairs = [
        make_pair(family, rng, *lengths, sample_index)
        for sample_index, lengths in enumerate([(1, 4, 3, 5), (1, 6, 2, 7), (2, 5, 6, 4), (0, 7, 3, 2)])
    ]
    # Other images can have another number of tokens.
    others = [make_pair(family, rng, images, text, 1, 1).prompt for images, text in ((1, 6), (2, 8), (2, 5))]
    pairs[1] = replace(pairs[1], other_prompt=others[0])
    pairs[2] = replace(pairs[2], other_prompt=others[1], rejected_prompt=others[2])
    return pairs


def forward(model: PairModel, pair: EncodedPair) -> PairLogps:
    """Run a model on one pair, in its own layout."""
    logps: PairLogps = model(build_batch([pair], "response", model.layout, collate=model.family.collate))
    return logps


@pytest.mark.parametrize(
    ("family", "lora", "checkpointing"),
    [
        pytest.param(family, *mode, marks=() if mode == MODES[number % len(MODES)] else pytest.mark.nightly)
        for number, family in enumerate(SHARING)
        for mode in MODES
    ],
)
def test_both_layouts_are_equal(family: str, lora: bool, checkpointing: Checkpointing) -> None:
    model = tiny_pair_model(family, lora, checkpointing)
    pairs = contrasted_pairs(family)
    packed = run(model, pairs, "shared_prefix", "prompt+response", objective=OBJECTIVE)
    assert_equal(packed, run(model, pairs, "concatenated", "prompt+response", objective=OBJECTIVE))


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=() if each in ("smolvlm", *CROSS) else pytest.mark.nightly) for each in TINY_FAMILIES],
)
def test_it_is_the_loss_of_each_answer_alone(family: str) -> None:
    """The reference: one forward for each pair, and one for each pair with its other images in place of its own."""
    model = tiny_pair_model(family)
    pairs = contrasted_pairs(family)
    pairs[2] = replace(pairs[2], rejected_prompt=None)
    layout = "concatenated" if family in CROSS else "shared_prefix"
    together = run(model, pairs, layout, objective=OBJECTIVE)
    total = torch.zeros(())
    for pair in pairs:
        logps = forward(model, replace(pair, other_prompt=None))
        if (prompt := pair.other_prompt) is not None:
            swapped = replace(pair, other_prompt=None, prompt_ids=prompt.ids, prompt_is_text=prompt.is_text,
                              images=prompt.images)  # fmt: skip
            other = forward(model, swapped)
            logps = replace(logps, other=other.chosen, other_tokens=other.chosen_tokens)
        total = total + OBJECTIVE.loss(logps, torch.ones(1), Normaliser(len(pairs)))[0]
    total.backward()
    torch.testing.assert_close(together[1], total.detach(), rtol=1e-5, atol=1e-5)
    expected = gradients(model)
    worst = max(relative_distance(together[2][name], each) for name, each in expected.items() if each.norm() > 1e-6)
    assert worst < 1e-5


def test_the_other_image_and_prompt_are_computed_once() -> None:
    model = tiny_pair_model("llava")
    pair = contrasted_pairs("llava")[1]
    seen: list[int] = []
    model.model.model.vision_tower.register_forward_hook(lambda *args: seen.append(len(args[2].last_hidden_state)))
    tokens: list[int] = []
    model.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    run(model, [pair], "shared_prefix", objective=OBJECTIVE)
    assert seen == [2]
    assert pair.other_prompt is not None
    own = len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
    assert tokens == [own + len(pair.other_prompt.ids) + len(pair.chosen_ids)]
