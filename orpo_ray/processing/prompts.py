"""Turn rendered prompts and their images into token ids and image tensors, with the model's own processor.

Legend: P prompt tokens, n images of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# The mask of a prompt whose tokens look at images by cross-attention, as processors name it: [P, n] (Idefics) or
# [P, n, tiles] (Mllama).
TOKEN_MASKS = ("image_attention_mask", "cross_attention_mask")
_TEXT_OUTPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
# Pixels are rescaled and normalized on the device: until then, uint8 takes a quarter of float32.
_RAW = {"do_rescale": False, "do_normalize": False}


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model takes it."""

    ids: np.ndarray
    """int32 [P]."""
    is_text: np.ndarray
    """bool [P]: False at image placeholders."""
    images: dict[str, np.ndarray]
    """The image tensors, with pixels as uint8 and several images one after another; empty without images."""


class PromptEncoder:
    """Encodes rendered prompts with a processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.is_idefics = type(processor).__name__ == "IdeficsProcessor"
        self.image_token: str = getattr(processor, "image_token", "<image>")
        """Text that represents an image in a rendered prompt."""
        self.image_token_ids = [int(token) for token in processor.image_token_ids]
        """Token id that represents an image. Not always the id of `image_token`: Gemma-3 expands it to others."""
        # A mask over the tokens of several prompts would be padded to the longest prompt.
        self.one_at_a_time = any(name in processor.model_input_names for name in TOKEN_MASKS)

    def encode(self, prompts: Sequence[tuple[str, list[Image.Image]]]) -> list[EncodedPrompt]:
        """Encode prompts whose images have the same number and sizes, so their tensors have the same shapes."""
        texts = [text for text, _ in prompts]
        if not prompts[0][1]:
            return [self._prompt(ids, {}) for ids in self.tokenize(texts)]
        if self.is_idefics:
            return [self._encode_idefics(text, images) for text, images in prompts]
        if self.one_at_a_time:
            return [self._encode_together([prompt])[0] for prompt in prompts]
        return self._encode_together(prompts)

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids of each text, without special tokens added."""
        return [np.asarray(ids, np.int32) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def model_inputs(self, text: str, images: list[Image.Image]) -> dict[str, Any]:
        """The arguments of the model's own `forward` and `generate` for one prompt: torch tensors, [1, P] and so on."""
        import torch

        if images and not self.is_idefics:
            return dict(self.processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt"))
        ids = torch.from_numpy(self.tokenize([text])[0].astype(np.int64)).unsqueeze(0)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            mask = self._encode_idefics(text, images).images["image_attention_mask"]
            inputs["image_attention_mask"] = torch.from_numpy(mask.astype(np.int64)).unsqueeze(0)
            inputs["pixel_values"] = self.processor.image_processor(images, return_tensors="pt").unsqueeze(0)
        return inputs

    def _encode_together(self, prompts: Sequence[tuple[str, list[Image.Image]]]) -> list[EncodedPrompt]:
        images = [images for _, images in prompts]
        out = self.processor(text=[text for text, _ in prompts], images=images, add_special_tokens=False, **_RAW)
        tensors = {name: np.asarray(value) for name, value in out.items() if name not in _TEXT_OUTPUTS}
        own = [self._image_tensors(tensors, index, len(prompts)) for index in range(len(prompts))]
        return [
            self._prompt(np.asarray(ids, np.int32), images) for ids, images in zip(out["input_ids"], own, strict=True)
        ]

    def _prompt(self, ids: np.ndarray, images: dict[str, np.ndarray]) -> EncodedPrompt:
        return EncodedPrompt(ids, ~np.isin(ids, self.image_token_ids), images)

    def _image_tensors(self, tensors: dict[str, np.ndarray], index: int, count: int) -> dict[str, np.ndarray]:
        """The image tensors of prompt `index` out of a batch of `count`, without the batch dimension."""
        pixels = tensors["pixel_values"]
        # Idefics and Mllama have a row per prompt. Other families put the images of all prompts one after another.
        by_prompt = pixels.ndim >= 5 and "image_sizes" not in tensors
        own = {name: value[index] if by_prompt else _slice_of(value, index, count) for name, value in tensors.items()}
        if pixels.ndim == 5 and not by_prompt:
            own["pixel_values"] = self._without_padded_tiles(own)
        own["pixel_values"] = np.ascontiguousarray(own["pixel_values"].astype(np.uint8))
        mask = own.get("pixel_attention_mask")
        if mask is not None and mask.all():
            del own["pixel_attention_mask"]
        return own

    def _without_padded_tiles(self, own: dict[str, np.ndarray]) -> np.ndarray:
        """Keep the real tiles: [n, tiles, 3, H, W], padded to the image with the most -> [tiles of all, 3, H, W]."""
        from transformers.image_processing_utils import select_best_resolution

        pixels, grids = own["pixel_values"], self.processor.image_processor.image_grid_pinpoints
        if "batch_num_images" in own and len(pixels) > 1:  # LLaVA-OneVision cuts a single image, but not several
            return pixels[:, 0]
        real = []
        for tiles, size in zip(pixels, own["image_sizes"], strict=True):
            height, width = select_best_resolution(tuple(size), grids)
            side = tiles.shape[-1]
            real.append(tiles[: 1 + -(-height // side) * -(-width // side)])
        return np.concatenate(real)

    def _encode_idefics(self, text: str, images: list[Image.Image]) -> EncodedPrompt:
        """Do what Idefics' processor does, which takes texts and images in turn, but no text with images in it."""
        import torch
        from transformers.models.idefics import processing_idefics

        (ids,) = self.tokenize([text])
        pixels = np.asarray(self.processor.image_processor(images, return_tensors="np", **_RAW))
        placeholders = np.flatnonzero(ids == self.image_token_ids[0])
        if len(placeholders) != len(images):
            raise ValueError(f"{len(placeholders)} placeholder(s) for {len(images)} image(s)")
        row = torch.from_numpy(ids.astype(np.int64)).unsqueeze(0)
        latest, _ = processing_idefics.image_attention_mask_for_packed_input_ids(row, self.tokenizer, "pt")
        mask = processing_idefics.incremental_to_binary_attention_mask(latest, "pt", num_classes=len(images))
        seen = mask[0].numpy().astype(np.uint8)
        return self._prompt(ids, {"pixel_values": pixels.astype(np.uint8), "image_attention_mask": seen})


def _slice_of(value: np.ndarray, index: int, count: int) -> np.ndarray:
    """The `index`-th of `count` equal slices."""
    length = len(value) // count
    return value[index * length : (index + 1) * length]
