"""LLaVA and the families that are built like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from orpo_ray.data.collate_images import ON_HOST, PIXELS, ImageArrays, TokenRows
from orpo_ray.data.transfer import PinnedConstants
from orpo_ray.model.families.base import Family, ImageTensors
from orpo_ray.processing.pixel_norm import PixelNorm

PREFIXES: dict[str, Any] = {
    "vision": ("model.vision_tower.",),
    "connector": ("model.multi_modal_projector.",),
    "language": ("model.language_model.",),
}


class Llava(Family):
    """Models look at images' sizes in Python, so sizes stay in main memory."""

    def collate(self, inputs: Sequence[ImageArrays], rows: TokenRows) -> dict[str, np.ndarray]:
        """All but the pixels stays in main memory."""
        tensors = super().collate(inputs, rows)
        return {ON_HOST + name if name in self._sizes else name: tensor for name, tensor in tensors.items()}

    def vision_inputs(self, images: Mapping[str, torch.Tensor], norm: PixelNorm, dtype: torch.dtype) -> ImageTensors:
        """With the names that the model knows."""
        sizes = {name: images[ON_HOST + name] for name in self._sizes if ON_HOST + name in images}
        return sizes | super().vision_inputs(images, norm, dtype)

    def encode_images(self, base: Any, inputs: ImageTensors) -> Any:
        """Some models put the lengths of their images on the device."""
        with PinnedConstants():
            return super().encode_images(base, inputs)

    @property
    def _sizes(self) -> set[str]:
        return set(self.image_inputs) - {PIXELS}


# Pixtral's vision encoder asks for sizes, CLIP's does not.
LLAVA = Llava(**PREFIXES, image_inputs=("pixel_values", "image_sizes"))


class Mistral3(Llava):
    """Images of any size, whose patches are merged before they reach the language model."""

    def encode_images(self, base: Any, inputs: ImageTensors) -> Any:
        """The library's own code fails on one image of one token, which is encoded twice here."""
        token = base.config.vision_config.patch_size * base.config.spatial_merge_size
        (height, width), *others = inputs["image_sizes"].tolist()
        if others or (height // token) * (width // token) > 1:
            return super().encode_images(base, inputs)
        found = super().encode_images(base, {name: torch.cat([value, value]) for name, value in inputs.items()})
        found.pooler_output = found.pooler_output[:1]
        return found


MISTRAL3 = Mistral3(**PREFIXES, image_inputs=("pixel_values", "image_sizes"))


class LlavaNext(Llava):
    """Images are cut into a varying number of tiles, which belong together."""

    def rows_per_image(self, config: Any, inputs: Mapping[str, torch.Tensor]) -> list[int]:
        """The tiles of each image, by its size."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        side, grids = config.vision_config.image_size, config.image_grid_pinpoints
        return [int(image_size_to_num_patches(size, grids, side)) for size in inputs["image_sizes"].tolist()]


class LlavaOnevision(LlavaNext):
    """Several images of a prompt are not cut into tiles."""

    def can_cache_images(self, config: Any) -> bool:
        """How an image is encoded depends on how many its prompt has."""
        return False


_NEXT_PREFIXES = PREFIXES | {"connector": ("model.multi_modal_projector.", "model.image_newline")}
LLAVA_NEXT = LlavaNext(**_NEXT_PREFIXES, image_inputs=("pixel_values", "image_sizes"))
LLAVA_ONEVISION = LlavaOnevision(**_NEXT_PREFIXES, image_inputs=("pixel_values", "image_sizes", "batch_num_images"))
