"""Idefics2, Idefics3 and SmolVLM: images of different sizes, padded, with a batch dimension around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from orpo_ray.data.collate_images import PIXELS, ImageArrays, concatenate_images
from orpo_ray.model.families.base import Family, ImageTensors
from orpo_ray.processing.pixel_norm import PixelNorm

PADDING_MASK = "pixel_attention_mask"


class Idefics3(Family):
    """A mask says which pixels are real; the vision encoder takes [1, n, 3, H, W]."""

    def collate(self, inputs: Sequence[ImageArrays], row_width: int) -> dict[str, np.ndarray]:
        """Add the mask where images of different sizes are joined."""
        return concatenate_images(inputs, row_width, PADDING_MASK)

    def vision_inputs(self, images: Mapping[str, torch.Tensor], norm: PixelNorm, dtype: torch.dtype) -> ImageTensors:
        """Padding stays 0."""
        return zero_padding(super().vision_inputs(images, norm, dtype))

    def encode_images(self, base: Any, inputs: ImageTensors) -> Any:
        """Add the batch dimension."""
        return super().encode_images(base, {name: value.unsqueeze(0) for name, value in inputs.items()})


def zero_padding(inputs: ImageTensors) -> ImageTensors:
    """Set padded pixels to 0: processors pad after normalizing, so padding is 0 there and not -mean / std."""
    mask = inputs.get(PADDING_MASK)
    return inputs if mask is None else inputs | {PIXELS: inputs[PIXELS] * mask.unsqueeze(1)}


IDEFICS3 = Idefics3(
    vision=("model.vision_model.",),
    connector=("model.connector.",),
    language=("model.text_model.",),
    image_inputs=(PIXELS, PADDING_MASK),
)
