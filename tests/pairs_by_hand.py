"""Pairs of any lengths and images for any family's tiny model, without a processor: random tokens and pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import Layout
from orpo_ray.model import shared_prefix
from orpo_ray.model.loading import PixelNorm, without_adapters
from orpo_ray.model.tiny_families import TINY_FAMILIES
from orpo_ray.objective.forward import PairModel

NORM = PixelNorm(1 / 255, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
TOKENS_OF_IMAGE = {"smolvlm": 16, "idefics3": 16, "llava": 16, "gemma3": 4, "paligemma": 16}


def tiny_pair_model(family: str, lora: bool = False, checkpointing: bool = False) -> PairModel:
    """A family's tiny model, all weights trained or with LoRA, able to run either layout (see `run_as`)."""
    model = TINY_FAMILIES[family]().model()
    shared_prefix.register()
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = r".*(language_model|text_model).*\.(q_proj|v_proj|gate_proj|down_proj)"
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PairModel(model.train(), NORM)


def run_as(model: PairModel, layout: Layout) -> None:
    """Give the language model the attention of a layout."""
    base = without_adapters(model.model)
    own = "eager" if getattr(base.config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"
    name = shared_prefix.NAME if layout == "shared_prefix" else own
    base.set_attn_implementation({"text_config": name, "vision_config": "sdpa"})
    model.layout = layout


def make_pair(
    family: str, rng: np.random.Generator, images: int, prompt: int, chosen: int, rejected: int, slot: int = 0
) -> EncodedPair:
    """`prompt` text tokens in all, some of them between the images."""
    config = TINY_FAMILIES[family]().config()
    text = rng.integers(12, 250, prompt + images)
    ids: list[int] = [int(text[0])]
    tensors: dict[str, list[np.ndarray]] = {"pixel_values": []}
    for image in range(images):
        count, parts = _image(family, rng)
        ids += [config.image_token_id] * count + [int(text[prompt + image])]
        for name, value in parts.items():
            tensors.setdefault(name, []).append(value)
    ids += text[1:prompt].tolist()
    answers = [rng.integers(12, 250, length).astype(np.int32) for length in (chosen, rejected)]
    prompt_ids = np.asarray(ids, np.int32)
    stacked = {name: np.concatenate(values) for name, values in tensors.items()} if images else {}
    return EncodedPair(str(slot), prompt_ids, *answers, prompt_ids != config.image_token_id, stacked, slot)


def _image(family: str, rng: np.random.Generator) -> tuple[int, dict[str, np.ndarray]]:
    """Image tokens of one image, and its tensors."""
    if family == "qwen2_5_vl":
        height, width = (2 * rng.integers(1, 4, 2)).tolist()
        pixels = rng.integers(0, 256, (height * width, 3 * 2 * 8 * 8)).astype(np.uint8)
        return height * width // 4, {"pixel_values": pixels, "image_grid_thw": np.asarray([[1, height, width]])}
    side = 64 if family in ("smolvlm", "idefics3") else 32
    return TOKENS_OF_IMAGE[family], {"pixel_values": rng.integers(0, 256, (1, 3, side, side)).astype(np.uint8)}


def gradients(model: PairModel) -> dict[str, torch.Tensor]:
    """Of every trained parameter that has one; they are cleared."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_distance(got: Any, expected: Any) -> float:
    """|got - expected| / |expected|, Euclidean."""
    return float((got - expected).norm() / expected.norm().clamp(min=1e-12))
