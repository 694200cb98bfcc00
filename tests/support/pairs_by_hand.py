"""Pairs with random tokens and pixels, of any length and number of images, for the tiny model of any family."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.data.balance import Layout
from orpo_ray.data.collate_images import TokenRows
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import build_batch
from orpo_ray.data.sharing import Shares
from orpo_ray.model import shared_prefix, vision_attention
from orpo_ray.model.gradient_checkpointing import enable_checkpointing
from orpo_ray.model.loading import vocabulary_size, without_adapters
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.logps import CHUNK_BYTES
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.tiny_models.families import TINY_FAMILIES

# Families with cross-attention to images.
CROSS = ("idefics", "mllama")
NORM = PixelNorm(1 / 255, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def tiny_pair_model(family: str, lora: bool = False, checkpointing: Checkpointing = "none") -> PairModel:
    """Load a family's tiny model, fully trained or with LoRA. It can run both layouts (see `run_as`)."""
    model = copy.deepcopy(_tiny(family))
    shared_prefix.register()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)  # the same adapters in every call
        targets = r".*(language_model|text_model).*\.(q_proj|v_proj|gate_proj|down_proj)"
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    enable_checkpointing(model, checkpointing)
    return PairModel(model.train(), NORM)


@cache
def _tiny(family: str) -> Any:
    return TINY_FAMILIES[family]().model()


def run_as(model: PairModel, layout: Layout) -> None:
    """Set the attention of the language model for a layout."""
    base = without_adapters(model.model)
    own = "eager" if getattr(base.config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"
    name = shared_prefix.NAME if layout == "shared_prefix" else own
    base.set_attn_implementation({"text_config": name, "vision_config": "sdpa"})
    vision_attention.use_in(base)
    model.layout = layout


def layouts_of(family: str) -> list[Layout]:
    """Return the layouts that a family supports, the preferred one first."""
    return ["concatenated"] if family in CROSS else ["shared_prefix", "concatenated"]


def make_pair(
    family: str, rng: np.random.Generator, images: int, prompt: int, chosen: int, rejected: int, sample_index: int = 0
) -> EncodedPair:
    """Make a pair with `prompt` text tokens, some of them between the images."""
    image_token = image_token_of(family)
    counts, tensors = _images(family, rng, images) if images else ([], {})
    text = rng.integers(12, 250, prompt + images)
    ids: list[int] = [int(text[0])]
    for image, count in enumerate(counts):
        ids += [image_token] * count + [int(text[prompt + image])]
    ids += text[1:prompt].tolist()
    answers = [rng.integers(12, 250, length).astype(np.int32) for length in (chosen, rejected)]
    prompt_ids = np.asarray(ids, np.int32)
    if family in CROSS and images:
        latest = np.cumsum(prompt_ids == image_token) - 1  # for each token, the image that it attends to
        sees = (latest[:, None] == np.arange(images)).astype(np.uint8)
        if family == "idefics":
            tensors["image_attention_mask"] = sees
        else:
            tensors["cross_attention_mask"] = sees[..., None] * tensors["aspect_ratio_mask"]
    return EncodedPair(str(sample_index), prompt_ids, *answers, prompt_ids != image_token, tensors, sample_index)


def make_row(family: str, row: list[tuple[int, int, int, int]]) -> list[EncodedPair]:
    """Make pairs from (images, prompt, chosen, rejected) sizes."""
    rng = np.random.default_rng(len(row))
    return [make_pair(family, rng, *lengths, sample_index) for sample_index, lengths in enumerate(row)]


def text_rows(count: int, width: int) -> TokenRows:
    """Return rows of tokens that hold no image."""
    return TokenRows(np.zeros((count, width), np.int64), np.zeros((count, width), bool))


@cache
def image_token_of(family: str) -> int:
    """Return the id of the image placeholder token."""
    if family == "idefics":
        return len(TINY_FAMILIES[family]().tokenizer) - 1
    config = TINY_FAMILIES[family]().config()
    return int(getattr(config, "image_token_id", None) or config.image_token_index)


def _images(family: str, rng: np.random.Generator, images: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """Return the tokens of each image of a pair, and the tensors of all images."""

    def pixels(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape).astype(np.uint8)

    if family.startswith("qwen"):
        grids = [[1, *(2 * rng.integers(1, 4, 2)).tolist()] for _ in range(images)]
        patches = sum(height * width for _, height, width in grids)
        tensors = {"pixel_values": pixels(patches, 3 * 2 * 8 * 8), "image_grid_thw": np.asarray(grids)}
        return [height * width // 4 for _, height, width in grids], tensors
    if family in ("llava_next", "llava_onevision"):
        whole = family == "llava_onevision" and images > 1
        wide = [bool(rng.integers(2)) for _ in range(images)]
        tiles = images if whole else sum(3 if each else 2 for each in wide)
        sizes = np.asarray([[32, 64] if each else [32, 32] for each in wide])
        tensors = {"pixel_values": pixels(tiles, 3, 32, 32), "image_sizes": sizes}
        if family == "llava_onevision":
            tensors["batch_num_images"] = np.asarray([images])
        return [17 if whole else 16 + (36 if each else 20) for each in wide], tensors
    if family in ("pixtral", "mistral3"):
        height, width = (16 * rng.integers(1, 3, 2)).tolist()
        side = 8 if family == "pixtral" else 16
        tensors = {
            "pixel_values": pixels(images, 3, height, width),
            "image_sizes": np.asarray([[height, width]] * images),
        }
        return [height * width // side**2] * images, tensors
    if family == "idefics2":
        height, width = (16 * rng.integers(1, 3, 2)).tolist()
        return [4] * images, {"pixel_values": pixels(images, 3, height, width)}
    if family == "internvl":
        tiles = rng.integers(1, 3, images).tolist()
        return [4 * each for each in tiles], {"pixel_values": pixels(sum(tiles), 3, 32, 32)}
    if family == "idefics":
        return [1] * images, {"pixel_values": pixels(images, 3, 32, 32)}
    if family == "mllama":
        ids = rng.integers(1, 3, images)  # one tile, or two
        mask = (np.arange(2) < ids[:, None]).astype(np.int64)
        tiles = pixels(images, 2, 3, 32, 32)
        return [1] * images, {"pixel_values": tiles, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}
    side = 64 if family in ("smolvlm", "idefics3") else 32
    return [4 if family == "gemma3" else 16] * images, {"pixel_values": pixels(images, 3, side, side)}


def gradients(model: PairModel) -> dict[str, torch.Tensor]:
    """Return the gradients of all trained parameters, and clear them."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_distance(got: Any, expected: Any) -> float:
    """|got - expected| / |expected|, Euclidean."""
    return float((got - expected).norm() / expected.norm().clamp(min=1e-12))


def run(
    model: PairModel,
    pairs: list[EncodedPair],
    layout: Any,
    nll: str = "response",
    targets: int = 2**20,
    objective: ORPO = ORPO(0.5),  # noqa: B008 - frozen
    shares: Shares = "nothing",
) -> Any:
    """Return log-probs, loss and the gradients of all parameters, in a layout; the head takes `targets` at once."""
    run_as(model, layout)
    batch = build_batch(pairs, nll, layout, collate=model.family.collate, shares=shares)
    batch = batch if model.group is None else model.group.with_own_targets(batch)
    torch.manual_seed(0)
    with patch.dict(CHUNK_BYTES, cpu=targets * 4 * vocabulary_size(model.model)):
        logps = model(batch)
    loss, _ = objective.loss(logps, batch.weights, Normaliser(len(pairs)))
    loss.backward()
    return logps, loss.detach(), gradients(model)


def assert_equal(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Check that two results of `run` are equal."""
    assert vars(got[0]).keys() == vars(expected[0]).keys()
    for name, value in vars(expected[0]).items():
        torch.testing.assert_close(vars(got[0])[name], value, rtol=tolerance, atol=tolerance, msg=name)
    torch.testing.assert_close(got[1], expected[1], rtol=tolerance, atol=tolerance)
    assert got[2].keys() == expected[2].keys()
    assert got[2]
    worst = max((relative_distance(got[2][name], gradient), name) for name, gradient in expected[2].items()
                if gradient.norm() > 1e-6)  # fmt: skip
    assert worst[0] < tolerance, worst
    # Gradients that are almost 0 must be so in the other layout too.
    assert all(got[2][name].norm() < 1e-5 for name, gradient in expected[2].items() if gradient.norm() <= 1e-6)
