"""A family added from outside, with one class and one registry entry: it loads, packs, trains, and shares prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.balance import Packing
from orpo_ray.data.collate_images import ImageArrays, TokenRows, concatenate_images
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import PairBatch
from orpo_ray.model.families.base import Family, ImageTensors
from orpo_ray.model.families.llava_like import PREFIXES
from orpo_ray.model.families.registry import FAMILIES
from orpo_ray.model.loading import load_model
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.pairs_by_hand import NORM, assert_equal, make_pair, run, run_as, text_rows

CPU = torch.device("cpu")
FIRST_POSITION = 3


class DimmerConfig(LlavaConfig):
    """Config of the invented family in transformers."""

    model_type = "dimmer"


class DimmerForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with a brightness per image, and an output head that halves its logits."""

    config_class = DimmerConfig


class Dimmer(Family):
    """The family in orpo-ray, which overrides every method that a family can override."""

    def collate(self, inputs: Sequence[ImageArrays], rows: TokenRows) -> dict[str, np.ndarray]:
        return concatenate_images(inputs) | {"row_width": np.asarray([rows.width])}

    def vision_inputs(self, images: Mapping[str, torch.Tensor], norm: PixelNorm, dtype: torch.dtype) -> ImageTensors:
        assert images["row_width"].shape == (1,)
        return super().vision_inputs(images, norm, dtype) | {"brightness": images["brightness"].to(dtype)}

    def encode_images(self, base: Any, inputs: ImageTensors) -> Any:
        output = base.get_image_features(inputs["pixel_values"], return_dict=True)
        bright = zip(output.pooler_output, inputs["brightness"], strict=True)
        output.pooler_output = [features * brightness for features, brightness in bright]
        return output

    def packed_positions(self, base: Any, batch: PairBatch) -> torch.Tensor:
        return batch.position_ids + FIRST_POSITION

    def concatenated_inputs(self, batch: PairBatch) -> dict[str, Any]:
        return {"position_ids": batch.position_ids + FIRST_POSITION}

    def logits(self, base: Any, hidden: torch.Tensor) -> torch.Tensor:
        return super().logits(base, hidden) / 2


@pytest.fixture
def dimmer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Save a tiny model of the family, registered in transformers and in orpo-ray during the test."""
    monkeypatch.setitem(FAMILIES, "dimmer", Dimmer(**PREFIXES, image_inputs=("pixel_values",)))
    AutoConfig.register("dimmer", DimmerConfig)
    AutoModelForImageTextToText.register(DimmerConfig, DimmerForConditionalGeneration)
    torch.manual_seed(0)
    settings = TINY_FAMILIES["llava"]().config().to_dict() | {"model_type": "dimmer"}
    DimmerForConditionalGeneration(DimmerConfig(**settings)).save_pretrained(tmp_path)
    yield str(tmp_path)
    CONFIG_MAPPING._extra_content.pop("dimmer")
    AutoModelForImageTextToText._model_mapping._extra_content.pop(DimmerConfig)


def dimmer_pairs() -> list[EncodedPair]:
    """Images of different brightness, and a pair without an image."""
    rng = np.random.default_rng(0)
    pairs = [
        make_pair("llava", rng, *lengths, i) for i, lengths in enumerate([(2, 5, 6, 4), (0, 3, 2, 5), (1, 4, 3, 3)])
    ]
    for pair in pairs:
        if pair.images:
            pair.images["brightness"] = rng.uniform(0.5, 2.0, len(pair.images["pixel_values"])).astype(np.float32)
    return pairs


def test_a_family_from_outside_trains_a_step(dimmer: str) -> None:
    model = PairModel(load_model(ModelConfig(id=dimmer), CPU, seed=0), NORM)
    assert isinstance(model.family, Dimmer)
    assert model.layout == "shared_prefix"
    pairs = dimmer_pairs()
    assert_equal(run(model, pairs, "shared_prefix"), run(model, pairs, "concatenated"))

    run_as(model, "shared_prefix")
    planner = StepPlanner(ORPO(), Packing(8192, model.layout), pairs[1], pairs[2], CPU, model.family.collate)
    plan = planner.plan(planner.share(pairs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        model.watch_images = True
        (batch,) = plan.batches
        loss, _ = ORPO(0.1).loss(model(batch), batch.weights, Normaliser(3.0))
        loss.backward()
        model.check_images_used()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


def test_its_own_forward_is_the_reference(dimmer: str) -> None:
    """Compares with the transformers model, with brightness, positions and halved logits computed by hand."""
    model = PairModel(load_model(ModelConfig(id=dimmer), CPU, seed=0), NORM)
    pairs = dimmer_pairs()
    got = run(model, pairs, "shared_prefix")[0]
    base = model.model
    base.set_attn_implementation("sdpa")
    for index, pair in enumerate(pairs):
        ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]], dtype=torch.long)
        embeds = base.get_input_embeddings()(ids)
        if pair.images:
            inputs = model.family.vision_inputs(
                {k: torch.from_numpy(v) for k, v in model.family.collate([pair.images], text_rows(1, 4)).items()},
                NORM,
                torch.float32,
            )
            plain = base.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
            bright = [each * float(b) for each, b in zip(plain, pair.images["brightness"], strict=True)]
            mask = ~torch.tensor([*pair.prompt_is_text, *[True] * len(pair.chosen_ids)])
            embeds = embeds.masked_scatter(mask[None, :, None], torch.cat(bright))
        positions = torch.arange(ids.shape[1])[None] + FIRST_POSITION
        logits = base(inputs_embeds=embeds, position_ids=positions).logits / 2
        logps = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(pair.prompt_ids) - 1 :, 0]
        torch.testing.assert_close(got.chosen[index].detach(), logps.sum().detach(), rtol=1e-5, atol=1e-5)
