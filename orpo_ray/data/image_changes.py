"""Changes to an image that take away what an answer may rest on. Each keeps its size, so it has as many tokens.

Legend: H, W height and width in pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

# A crop's share of the image's area.
CROP_AREA = (0.05, 0.2)
# Pixels from -1 to 1 times the first number, plus normal noise times the second: what is left halfway through the
# diffusion of 1,000 steps that visual contrastive decoding (2311.16922) uses.
_SIGNAL, _NOISE = 0.28, 0.96
_GRAY = (127, 127, 127)
_VALUES_AT_ONCE = 1 << 22


def changed(image: Image.Image, change: str, seed: int, place: int) -> Image.Image:
    """Change an image.

    Args:
        image: RGB.
        change: `crop`, `noise` or `blank`.
        seed: of the pair in its epoch.
        place: number of the image in its pair.
    """
    rng = np.random.default_rng([seed, place])
    if change == "crop":
        return _crop(image, rng)
    return _noise(image, rng) if change == "noise" else Image.new("RGB", image.size, _GRAY)


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Enlarge a random part of the same proportions."""
    side = np.sqrt(rng.uniform(*CROP_AREA))
    width, height = (max(1, round(side * size)) for size in image.size)
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    box = (int(left), int(top), int(left) + width, int(top) + height)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=box)


def _noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Add noise, some rows at a time: [H, W, 3]."""
    pixels = np.asarray(image)
    out = np.empty_like(pixels)
    rows = max(1, _VALUES_AT_ONCE // (3 * image.width))
    for first in range(0, image.height, rows):
        few = pixels[first : first + rows].astype(np.float32) / 127.5 - 1
        few = _SIGNAL * few + _NOISE * rng.standard_normal(few.shape, np.float32)
        out[first : first + rows] = np.clip((few + 1) * 127.5, 0, 255).astype(np.uint8)
    return Image.fromarray(out)
