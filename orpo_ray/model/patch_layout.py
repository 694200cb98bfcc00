"""What the vision encoders of Qwen2.5-VL and Qwen3-VL must know of the sizes of their images, computed on the host.

The encoders can compute all of this themselves, from sizes that they read back from the device in every forward.

Legend: n images, N patches of all images, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orpo_ray.data.collate_images import ON_HOST
from orpo_ray.model.vision_attention import PatchSequences

# Names in `PairBatch.images` begin with this; what follows is the encoder's name of the argument.
PREFIX = "patch_layout."
_LENGTHS = {"cu_seqlens": f"{ON_HOST}image_patches", "cu_window_seqlens": f"{ON_HOST}window_patches"}
_LONGEST = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}


@dataclass(frozen=True)
class PatchFacts:
    """What the layout depends on besides the images' sizes."""

    merge: int
    """Patches per side of what becomes one token."""
    patch: int
    """Pixels per side of a patch."""
    window: int | None
    """Pixels per side of a window; None if there are no windows."""
    position_grid: int | None
    """Learned positions per side, from which those of each image are interpolated; None if there are none."""

    @classmethod
    def of(cls, vision_config: Any) -> PatchFacts:
        """Read them from the config of the vision encoder."""
        positions = getattr(vision_config, "num_position_embeddings", None)
        return cls(
            vision_config.spatial_merge_size,
            vision_config.patch_size,
            getattr(vision_config, "window_size", None),
            None if positions is None else int(positions**0.5),
        )


def patch_layout(facts: PatchFacts, grids: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the layout of a batch.

    Args:
        facts: of the encoder.
        grids: int64 [n, 3], the size of each image in patches: time, height, width.

    Returns:
        Tensors for `PairBatch.images`.
    """
    from transformers import vision_utils

    sizes = torch.from_numpy(grids)
    tensors = {
        "position_ids": vision_utils.get_vision_position_ids(sizes, facts.merge),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(sizes),
    }
    if facts.window is not None:
        tensors["window_index"], tensors["cu_window_seqlens"] = _windows(facts, sizes)
    if facts.position_grid is not None:
        make = vision_utils.get_vision_interpolation_indices_and_weights
        tensors["interp_indices"], tensors["interp_weights"] = make(
            sizes, facts.position_grid, align_corners=True, spatial_merge_size=facts.merge
        )
    layout = {PREFIX + name: tensor.numpy() for name, tensor in tensors.items()}
    return layout | {
        lengths: tensors[starts].diff().numpy() for starts, lengths in _LENGTHS.items() if starts in tensors
    }


def encoder_arguments(images: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of the encoder's forward, from `patch_layout`'s tensors on the device."""
    arguments: dict[str, Any] = {
        name.removeprefix(PREFIX): tensor for name, tensor in images.items() if name.startswith(PREFIX)
    }
    sequences = []
    for starts, lengths in _LENGTHS.items():
        if starts in arguments:
            sequences.append(PatchSequences(arguments[starts], tuple(images[lengths].tolist())))
            arguments[_LONGEST[starts]] = max(sequences[-1].lengths)
    return arguments | {"patch_sequences": tuple(sequences)}


def image_patches(images: dict[str, torch.Tensor]) -> list[int]:
    """Return the patches of each image, from `patch_layout`'s tensors."""
    patches: list[int] = images[_LENGTHS["cu_seqlens"]].tolist()
    return patches


def _windows(facts: PatchFacts, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order of the tokens by window, int64 [N / merge ** 2], and where windows begin, int32 [W + 1].

    Within an image, windows of equal length are neighbors, so that a kernel can take them in one call. The encoder
    restores the order of the tokens, so the order of the windows is free.
    """
    from transformers import vision_utils

    orders, lengths, first = [], [], 0
    for size in sizes:
        frame = int(size[1] * size[2])
        order, starts = vision_utils.get_vision_window_index(size[None], facts.merge, facts.window, facts.patch)
        own = starts.diff().numpy()
        by_length = np.lexsort((-own, starts[:-1].numpy() // frame))
        windows = order.split((own // facts.merge**2).tolist())
        orders += [windows[index] + first for index in by_length]
        lengths.append(own[by_length])
        first += len(order)
    starts = np.concatenate([[0], *lengths]).cumsum()
    return torch.cat(orders), torch.from_numpy(starts.astype(np.int32))
