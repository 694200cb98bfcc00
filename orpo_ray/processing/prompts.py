"""A rendered prompt with its images -> token ids and vision tensors, by the model's own processor.

Legend: P prompt tokens, n images of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from orpo_ray.processing.cross_images import TOKEN_MASKS

_TEXT_OUTPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
# Rescaling and normalising wait for the device: uint8 is a quarter of float32 on the way there.
_RAW = {"do_rescale": False, "do_normalize": False}


@dataclass(frozen=True)
class EncodedPrompt:
    """What an answer is given to. ids [P]: int32; is_text [P]: bool, False at image placeholders.

    images: what the model's vision part takes, pixels as uint8; of several images one after the other.
    """

    ids: np.ndarray
    is_text: np.ndarray
    images: dict[str, np.ndarray]


class PromptEncoder:
    """Prompts, as a chat template renders them, through a processor.

    image_token: what stands for an image in a rendered prompt. image_token_ids: what stands there in the ids.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.is_idefics = type(processor).__name__ == "IdeficsProcessor"
        self.image_token: str = getattr(processor, "image_token", "<image>")
        # Not always that token's own id: Gemma-3 writes one token where an image goes, and expands it into others.
        self.image_token_ids = [int(token) for token in processor.image_token_ids]
        # A mask over the tokens of several prompts would be padded to the longest.
        self.one_at_a_time = any(name in processor.model_input_names for name in TOKEN_MASKS)

    def encode(self, asked: Sequence[tuple[str, list[Image.Image]]]) -> list[EncodedPrompt]:
        """Prompts whose images have the same number and sizes, which so come out in one shape."""
        texts = [text for text, _ in asked]
        if not asked[0][1]:
            return [self._prompt(ids, {}) for ids in self.tokenize(texts)]
        if self.is_idefics:
            return [self._idefics(text, images) for text, images in asked]
        if self.one_at_a_time:
            return [self._together([one])[0] for one in asked]
        return self._together(asked)

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids of each text, nothing added."""
        return [np.asarray(ids, np.int32) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _together(self, asked: Sequence[tuple[str, list[Image.Image]]]) -> list[EncodedPrompt]:
        images = [images for _, images in asked]
        out = self.processor(text=[text for text, _ in asked], images=images, add_special_tokens=False, **_RAW)
        tensors = {name: np.asarray(value) for name, value in out.items() if name not in _TEXT_OUTPUTS}
        parts = [self._part(tensors, place, len(asked)) for place in range(len(asked))]
        return [
            self._prompt(np.asarray(ids, np.int32), part) for ids, part in zip(out["input_ids"], parts, strict=True)
        ]

    def _prompt(self, ids: np.ndarray, images: dict[str, np.ndarray]) -> EncodedPrompt:
        return EncodedPrompt(ids, ~np.isin(ids, self.image_token_ids), images)

    def _part(self, tensors: dict[str, np.ndarray], place: int, count: int) -> dict[str, np.ndarray]:
        """The tensors of one prompt out of a batch of `count`, without the batch's own dimension."""
        pixels = tensors["pixel_values"]
        # Idefics and Mllama have a row per prompt, the others one after the other whatever belongs to any of them.
        by_prompt = pixels.ndim >= 5 and "image_sizes" not in tensors
        part = {name: value[place] if by_prompt else _share(value, place, count) for name, value in tensors.items()}
        if pixels.ndim == 5 and not by_prompt:
            part["pixel_values"] = self._without_padding(part)
        part["pixel_values"] = np.ascontiguousarray(part["pixel_values"].astype(np.uint8))
        mask = part.get("pixel_attention_mask")
        if mask is not None and mask.all():
            del part["pixel_attention_mask"]
        return part

    def _without_padding(self, part: dict[str, np.ndarray]) -> np.ndarray:
        """Of [n, tiles, 3, H, W], padded to the image with the most tiles, the real ones: [tiles of all, 3, H, W]."""
        from transformers.image_processing_utils import select_best_resolution

        pixels, grids = part["pixel_values"], self.processor.image_processor.image_grid_pinpoints
        if "batch_num_images" in part and len(pixels) > 1:  # LLaVA-OneVision cuts one image, but not several
            return pixels[:, 0]
        real = []
        for tiles, size in zip(pixels, part["image_sizes"], strict=True):
            height, width = select_best_resolution(tuple(size), grids)
            side = tiles.shape[-1]
            real.append(tiles[: 1 + -(-height // side) * -(-width // side)])
        return np.concatenate(real)

    def _idefics(self, text: str, images: list[Image.Image]) -> EncodedPrompt:
        """As its processor does, which takes no text with images in it, but pieces of text between images."""
        from transformers.models.idefics import processing_idefics

        (ids,) = self.tokenize([text])
        pixels = np.asarray(self.processor.image_processor(images, return_tensors="np", **_RAW))
        places = np.flatnonzero(ids == self.image_token_ids[0])
        if len(places) != len(images):
            raise ValueError(f"{len(places)} placeholder(s) for {len(images)} image(s)")
        row = torch.from_numpy(ids.astype(np.int64)).unsqueeze(0)
        latest, _ = processing_idefics.image_attention_mask_for_packed_input_ids(row, self.tokenizer, "pt")
        mask = processing_idefics.incremental_to_binary_attention_mask(latest, "pt", num_classes=len(images))
        seen = mask[0].numpy().astype(np.uint8)
        return self._prompt(ids, {"pixel_values": pixels.astype(np.uint8), "image_attention_mask": seen})


def _share(value: np.ndarray, place: int, count: int) -> np.ndarray:
    each = len(value) // count
    return value[place * each : (place + 1) * each]
