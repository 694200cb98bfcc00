"""LLaVA and the families that are built like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from orpo_ray.model.families.base import Family

PREFIXES: dict[str, Any] = {
    "vision": ("model.vision_tower.",),
    "connector": ("model.multi_modal_projector.",),
    "language": ("model.language_model.",),
}
# Pixtral's vision encoder asks for sizes, CLIP's does not.
LLAVA = Family(**PREFIXES, image_inputs=("pixel_values", "image_sizes"))


class LlavaNext(Family):
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
