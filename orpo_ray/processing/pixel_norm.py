"""What a processor would have done to pixels, as numbers, so that the device can do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PixelNorm:
    """What the image processor would have done to 0..255: (x * rescale - mean) / std, per channel."""

    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> PixelNorm:
        """Read off a processor's own image processor."""
        image = processor.image_processor
        rescale = float(image.rescale_factor) if image.do_rescale else 1.0
        if not image.do_normalize:
            return cls(rescale, (0.0,), (1.0,))
        return cls(rescale, tuple(image.image_mean), tuple(image.image_std))
