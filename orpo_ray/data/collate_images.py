"""Join the image tensors of several prompts into those of one forward.

How they are joined differs by model family, so `build_batch` is given the family's `collate`. What most families need
is here.

Legend: n images or tiles of all prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from orpo_ray.data.branches import Branch

PIXELS = "pixel_values"
# Tensors whose names begin with this stay in main memory: reading numbers back from a device would wait for it.
ON_HOST = "on_host."
ImageArrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class TokenRows:
    """The rows of tokens of a batch, for tensors that depend on where images lie in them."""

    ids: np.ndarray
    """int64 [rows, T], as `PairBatch.input_ids`."""
    is_image: np.ndarray
    """bool [rows, T]: image placeholders."""
    branches: Sequence[Branch] = ()
    """`PairBatch.branches`, of a packed row."""

    @property
    def width(self) -> int:
        """T."""
        return self.ids.shape[1]


class Collate(Protocol):
    """Joins the image tensors of several prompts."""

    def __call__(self, inputs: Sequence[ImageArrays], rows: TokenRows) -> dict[str, np.ndarray]:
        """Join the tensors of all prompts that have images.

        Args:
            inputs: one mapping per prompt, in the order of the batch; empty for a prompt without images. At least one
                is not empty.
            rows: the tokens of the batch.
        """
        ...


def concatenate_images(
    inputs: Sequence[ImageArrays], rows: TokenRows | None = None, padding_mask: str | None = None
) -> dict[str, np.ndarray]:
    """Put the images of all prompts one after another; smaller ones are padded with 0 at the bottom and on the right.

    Args:
        inputs: see `Collate`.
        rows: not used.
        padding_mask: name of the tensor that says which pixels are real. It is added where images of different sizes
            are joined; images without one are real as a whole.
    """
    with_images = [images for images in inputs if images]
    names = {name for images in with_images for name in images}
    if padding_mask is not None and len({images[PIXELS].shape[2:] for images in with_images}) > 1:
        names.add(padding_mask)
    out: dict[str, np.ndarray] = {}
    for name in sorted(names):
        if name == padding_mask:
            arrays = [images[name] if name in images else _full_mask(images[PIXELS]) for images in with_images]
        else:
            arrays = [images[name] for images in with_images]
        out[name] = _concatenate_padded(arrays)
    return out


def _concatenate_padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate along the first axis; images and masks of different sizes are padded to the largest."""
    if arrays[0].ndim < 3 or len({array.shape[-2:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    largest = np.max([array.shape[-2:] for array in arrays], axis=0)
    padding = [[(0, 0)] * (array.ndim - 2) + [(0, int(n)) for n in largest - array.shape[-2:]] for array in arrays]
    return np.concatenate([np.pad(array, pad) for array, pad in zip(arrays, padding, strict=True)])


def _full_mask(pixels: np.ndarray) -> np.ndarray:
    """A mask for images without padding: pixels [n, 3, H, W] -> int64 ones [n, H, W]."""
    return np.ones((pixels.shape[0], *pixels.shape[-2:]), np.int64)
