"""Rescale and normalize pixels on the device, with the numbers of the model's own image processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PixelNorm:
    """Normalization of pixels from 0 to 255 as in the image processor: (x * rescale - mean) / std, per channel."""

    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> PixelNorm:
        """Read the numbers from a processor's image processor."""
        image = processor.image_processor
        rescale = float(image.rescale_factor) if image.do_rescale else 1.0
        if not image.do_normalize:
            return cls(rescale, (0.0,), (1.0,))
        return cls(rescale, tuple(image.image_mean), tuple(image.image_std))


def normalize_pixels(pixels: torch.Tensor, norm: PixelNorm) -> torch.Tensor:
    """Compute what the processor itself would have made of raw pixels.

    Args:
        pixels: uint8 [..., 3, H, W], or [patches, 3 * pixels] for families that cut images into patches.
        norm: the processor's numbers.

    Returns:
        float32 of the same shape.
    """
    mean, std = _column(norm.mean, pixels.device), _column(norm.std, pixels.device)
    by_channel = pixels.flatten(-2).flatten(0, -3) if pixels.ndim > 2 else pixels.reshape(len(pixels), 3, -1)
    return ((by_channel.float() * norm.rescale - mean) / std).view_as(pixels)


def _column(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Make float32 [values, 1] by filling: a copy from main memory would wait for the device."""
    import torch

    return torch.cat([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])
