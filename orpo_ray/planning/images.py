"""Tokens of an image, and the inputs of the vision encoder for it, according to a model's config.

Without a data check, an image is assumed to be a photo of 1024 x 768 pixels, processed with the family's
settings on the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH, HEIGHT = 1024, 768


@dataclass(frozen=True)
class ImageShape:
    """Sizes of one image in a model."""

    tokens: int
    """Image tokens in the prompt."""
    vision: dict[str, np.ndarray]
    """Inputs of the vision encoder, with values of 0."""
    description: str
    """How the image is divided, for the list of assumptions."""


def image_shape(config: Any, tokens: int | None = None) -> ImageShape:
    """Return the sizes of a photo, or of an image that has `tokens` tokens."""
    vision = config.vision_config
    if config.model_type.startswith("qwen"):
        return _by_patches(config, tokens)
    if vision.model_type == "pixtral":
        return _by_rows(config, tokens)
    side, patch = (value if isinstance(value, int) else value[0] for value in (vision.image_size, vision.patch_size))
    patches = side // patch
    match config.model_type:
        case "smolvlm" | "idefics3":
            # A photo is enlarged and divided into 4 x 3 tiles, plus a thumbnail.
            return _by_tiles(side, patches**2 // config.scale_factor**2, 13, tokens)
        case "internvl":
            # Up to 12 tiles, depending on the aspect ratio, plus a thumbnail.
            return _by_tiles(side, int((patches * config.downsample_ratio) ** 2), 13, tokens)
        case "idefics2":
            latents = config.perceiver_config.resampler_n_latents
            pixels = np.zeros((1, 3, side * 3 // 4, side), np.uint8)
            mask = np.ones((1, side * 3 // 4, side), np.int64)
            return ImageShape(latents, {"pixel_values": pixels, "pixel_attention_mask": mask}, "undivided")
        case "gemma3":
            return _by_tiles(side, config.mm_tokens_per_image, 1, None)
        case "llava_next" | "llava_onevision":
            return _by_grid(config, side, patches)
        case _:
            return _by_tiles(side, patches**2, 1, None)


def _by_tiles(side: int, each: int, tiles: int, tokens: int | None) -> ImageShape:
    """Square tiles of `each` tokens."""
    if tokens is not None:
        tiles = max(1, round(tokens / each))
    description = f"{tiles} tile{'s' if tiles > 1 else ''} of {side} x {side}"
    return ImageShape(tiles * each, {"pixel_values": np.zeros((tiles, 3, side, side), np.uint8)}, description)


def _by_grid(config: Any, side: int, patches: int) -> ImageShape:
    """LLaVA-1.6: a thumbnail, plus the tiles of the best grid without padding, with a token at the end of each row."""
    from transformers.image_processing_utils import select_best_resolution

    high, wide = select_best_resolution((HEIGHT, WIDTH), config.image_grid_pinpoints)
    shape = _by_tiles(side, patches**2, 1 + (high // side) * (wide // side), None)
    rows, columns = patches * high // side, patches * wide // side
    if columns / rows < WIDTH / HEIGHT:
        rows -= (rows - int(HEIGHT * columns / WIDTH)) // 2 * 2
    else:
        columns -= (columns - int(WIDTH * rows / HEIGHT)) // 2 * 2
    sizes = {"image_sizes": np.asarray([[HEIGHT, WIDTH]])}
    return ImageShape(patches**2 + rows * (columns + 1), shape.vision | sizes, shape.description)


def _by_rows(config: Any, tokens: int | None) -> ImageShape:
    """Pixtral: the original size, as rows of tokens."""
    cell = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    width, height = _grid(WIDTH // cell, HEIGHT // cell, tokens)
    pixels = np.zeros((1, 3, height * cell, width * cell), np.uint8)
    sizes = np.asarray([[height * cell, width * cell]])
    return ImageShape(width * height, {"pixel_values": pixels, "image_sizes": sizes}, f"{width} x {height} tokens")


def _grid(width: int, height: int, tokens: int | None) -> tuple[int, int]:
    """Return width and height in cells; with `tokens`, those of a photo with so many tokens."""
    if tokens is None:
        return max(1, width), max(1, height)
    width = max(1, round((tokens * WIDTH / HEIGHT) ** 0.5))
    return width, max(1, round(tokens / width))


def _by_patches(config: Any, tokens: int | None) -> ImageShape:
    """Qwen: the original size, as patches."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    cell = vision.patch_size * merge
    width, height = _grid(round(WIDTH / cell), round(HEIGHT / cell), tokens)
    count = width * height * merge**2
    pixels = np.zeros((count, 3 * vision.temporal_patch_size * vision.patch_size**2), np.uint8)
    grid = np.asarray([[1, height * merge, width * merge]])
    return ImageShape(width * height, {"pixel_values": pixels, "image_grid_thw": grid}, f"{count} patches")
