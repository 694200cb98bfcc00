"""Images for language models that look at them by cross-attention: by row, with a mask of who sees which.

Legend: R rows, T tokens of a row, P prompt tokens, n images of a prompt, N the most images of any row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# What processors call the mask of a prompt: [P, n] (Idefics) or [P, n, tiles] (Mllama).
TOKEN_MASKS = ("image_attention_mask", "cross_attention_mask")


def looks_by_cross_attention(images: Mapping[str, np.ndarray]) -> bool:
    """Whether the vision tensors of a prompt come with such a mask."""
    return any(name in images for name in TOKEN_MASKS)


def cross_images(inputs: Sequence[Mapping[str, np.ndarray]], width: int) -> dict[str, np.ndarray]:
    """The vision tensors of R rows of `width` tokens, one mapping each, empty for a row without images.

    Images come one after the other; `images_per_row` [R] says whose they are, `cross_mask` uint8 [R, T, N, ...] which
    of its row's images a token sees. An answer sees what its prompt's last token does, as when it is generated.
    """
    with_images = [images for images in inputs if images]
    (mask_name,) = (name for name in TOKEN_MASKS if name in with_images[0])
    counts = [len(images["pixel_values"]) if images else 0 for images in inputs]
    mask = np.zeros((len(inputs), width, max(counts), *with_images[0][mask_name].shape[2:]), np.uint8)
    for row, (images, count) in enumerate(zip(inputs, counts, strict=True)):
        if images:
            own = images[mask_name]
            mask[row, : len(own), :count] = own
            mask[row, len(own) :, :count] = own[-1]
    names = [name for name in with_images[0] if name != mask_name]
    tensors = {name: np.concatenate([images[name] for images in with_images]) for name in names}
    return tensors | {"images_per_row": np.asarray(counts), "cross_mask": mask}
