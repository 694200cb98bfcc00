"""Idefics2, Idefics3 and SmolVLM: images of different sizes, padded, with a batch dimension around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from orpo_ray.data.collate_images import PIXELS, ImageArrays, TokenRows, concatenate_images
from orpo_ray.model.families.base import Family, ImageTensors
from orpo_ray.model.hooked_call import call_with
from orpo_ray.processing.pixel_norm import PixelNorm

PADDING_MASK = "pixel_attention_mask"


class Idefics2(Family):
    """A mask says which pixels are real; the model takes [1, n, 3, H, W]."""

    def collate(self, inputs: Sequence[ImageArrays], rows: TokenRows) -> dict[str, np.ndarray]:
        """Add the mask where images of different sizes are joined."""
        return concatenate_images(inputs, padding_mask=PADDING_MASK) | self.image_positions(rows)

    def vision_inputs(self, images: Mapping[str, torch.Tensor], norm: PixelNorm, dtype: torch.dtype) -> ImageTensors:
        """Padding stays 0."""
        return zero_padding(super().vision_inputs(images, norm, dtype))

    def encode_images(self, base: Any, inputs: ImageTensors) -> Any:
        """Add the batch dimension."""
        return super().encode_images(base, {name: value.unsqueeze(0) for name, value in inputs.items()})


class Idefics3(Idefics2):
    """Also SmolVLM: a patch counts if one of its pixels is real."""

    def encode_images(self, base: Any, inputs: ImageTensors) -> Any:
        """As the model's `get_image_features`, but without waiting for the device.

        The model looks for images that are padding, of which there are none here, and whether its mask is full.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        vision, pixels, mask = base.model.vision_model, inputs[PIXELS], inputs.get(PADDING_MASK)
        if mask is not None and vision.config._attn_implementation != "sdpa":
            return super().encode_images(base, inputs)  # masks of other kinds of attention have other forms
        patches = _patch_mask(pixels, mask, base.config.vision_config.patch_size)

        def encode(pixels: torch.Tensor) -> Any:
            states = vision.embeddings(pixel_values=pixels, patch_attention_mask=patches)
            seen = None
            if mask is not None:
                seen = patches.flatten(1)[:, None, None].expand(-1, 1, states.shape[1], -1)  # [n, 1, patches, patches]
            states = vision.encoder(inputs_embeds=states, attention_mask=seen).last_hidden_state
            return BaseModelOutputWithPooling(vision.post_layernorm(states))

        output = call_with(vision, encode, pixels)
        output.pooler_output = [base.model.connector(output.last_hidden_state).flatten(0, 1)]
        return output


def _patch_mask(pixels: torch.Tensor, mask: torch.Tensor | None, side: int) -> torch.Tensor:
    """Which patches are real: bool [n, rows, columns]."""
    if mask is None:
        rows, columns = pixels.shape[-2] // side, pixels.shape[-1] // side
        return torch.ones(len(pixels), rows, columns, dtype=torch.bool, device=pixels.device)
    return mask.unfold(1, side, side).unfold(2, side, side).sum((-1, -2)) > 0


def zero_padding(inputs: ImageTensors) -> ImageTensors:
    """Set padded pixels to 0: processors pad after normalizing, so padding is 0 there and not -mean / std."""
    mask = inputs.get(PADDING_MASK)
    return inputs if mask is None else inputs | {PIXELS: inputs[PIXELS] * mask.unsqueeze(1)}


_PARTS: dict[str, Any] = {
    "vision": ("model.vision_model.",),
    "connector": ("model.connector.",),
    "language": ("model.text_model.",),
    "image_inputs": (PIXELS, PADDING_MASK),
}
IDEFICS2 = Idefics2(**_PARTS)
IDEFICS3 = Idefics3(**_PARTS)
