"""What one image becomes by a model's config: its tokens, and the tensors that the vision part takes.

Without data to ask, an image is a photo of 1024 x 768 pixels, as each family's processor is set up on the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH, HEIGHT = 1024, 768


@dataclass(frozen=True)
class ImageShape:
    """tokens: placeholders of one image. vision: its tensors, zeros. how: in words, for the assumptions."""

    tokens: int
    vision: dict[str, np.ndarray]
    how: str


def image_shape(config: Any, tokens: int | None = None) -> ImageShape:
    """Of a photo, or of an image that is known to become so many tokens."""
    vision = config.vision_config
    if config.model_type.startswith("qwen"):
        return _by_patches(config, tokens)
    side, patches = vision.image_size, vision.image_size // vision.patch_size
    match config.model_type:
        case "smolvlm" | "idefics3":
            # A photo is enlarged and cut into 4 x 3 tiles, and comes whole besides.
            return _by_tiles(side, patches**2 // config.scale_factor**2, 13, tokens)
        case "idefics2":
            latents = config.perceiver_config.resampler_n_latents
            pixels = np.zeros((1, 3, side * 3 // 4, side), np.uint8)
            mask = np.ones((1, side * 3 // 4, side), np.int64)
            return ImageShape(latents, {"pixel_values": pixels, "pixel_attention_mask": mask}, "whole")
        case "gemma3":
            return _by_tiles(side, config.mm_tokens_per_image, 1, None)
        case "llava_next" | "llava_onevision":
            # The whole image, and 2 x 2 tiles of which a photo fills three quarters, with a token at each line's end.
            shape = _by_tiles(side, patches**2, 5, None)
            lines = 2 * patches * 3 // 4
            found = patches**2 + lines * (2 * patches + 1)
            sizes = {"image_sizes": np.asarray([[HEIGHT, WIDTH]])}
            return ImageShape(found, shape.vision | sizes, "5 tiles")
        case _:
            return _by_tiles(side, patches**2, 1, None)


def _by_tiles(side: int, each: int, tiles: int, tokens: int | None) -> ImageShape:
    """Square tiles with equally many tokens."""
    if tokens is not None:
        tiles = max(1, round(tokens / each))
    how = f"{tiles} tile{'s' if tiles > 1 else ''} of {side} x {side}"
    return ImageShape(tiles * each, {"pixel_values": np.zeros((tiles, 3, side, side), np.uint8)}, how)


def _by_patches(config: Any, tokens: int | None) -> ImageShape:
    """As many patches as the image has room for."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    cell = vision.patch_size * merge
    width, height = round(WIDTH / cell), round(HEIGHT / cell)
    if tokens is not None:
        width = max(1, round((tokens * WIDTH / HEIGHT) ** 0.5))
        height = max(1, round(tokens / width))
    count = width * height * merge**2
    pixels = np.zeros((count, 3 * vision.temporal_patch_size * vision.patch_size**2), np.uint8)
    grid = np.asarray([[1, height * merge, width * merge]])
    return ImageShape(width * height, {"pixel_values": pixels, "image_grid_thw": grid}, f"{count} patches")
