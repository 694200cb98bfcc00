"""Qwen2.5-VL and Qwen3-VL: images as rows of patches, positions with three axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from orpo_ray.data.collate_images import PIXELS, ImageArrays, TokenRows
from orpo_ray.data.packing import IMAGE, PairBatch
from orpo_ray.model.families.base import Family, ImageTensors
from orpo_ray.model.patch_layout import PatchFacts, encoder_arguments, image_patches, patch_layout
from orpo_ray.model.rope_positions import rope_positions
from orpo_ray.processing.pixel_norm import PixelNorm

GRID = "image_grid_thw"
# In `PairBatch.images`: int64 [3, rows, T].
ROPE = "rope_positions"


@dataclass(frozen=True)
class QwenVL(Family):
    """The size of each image in patches is its own tensor, `image_grid_thw` [n, 3]: time, height, width."""

    facts: PatchFacts | None = None
    """Of the vision encoder; None until the family is fitted to a config."""

    def fitted(self, config: Any) -> QwenVL:
        """Keep what the layout of patches depends on."""
        # Qwen3-VL's language model also adds features to its first layers, so the model itself looks for their places.
        has_deepstack = hasattr(config.vision_config, "deepstack_visual_indexes")
        token = None if has_deepstack else config.image_token_id
        return replace(self, image_token=token, facts=PatchFacts.of(config.vision_config))

    def can_cache_images(self, config: Any) -> bool:
        """Qwen3-VL's vision encoder also gives features to the first language layers."""
        return not hasattr(config.vision_config, "deepstack_visual_indexes")

    def collate(self, inputs: Sequence[ImageArrays], rows: TokenRows) -> dict[str, np.ndarray]:
        """Add what the vision encoder would compute from the sizes of its images."""
        tensors = super().collate(inputs, rows)
        if self.facts is None:
            return tensors
        positions = rope_positions(rows, tensors[GRID], self.facts.merge)
        return tensors | patch_layout(self.facts, tensors[GRID]) | {ROPE: positions}

    def vision_inputs(self, images: Mapping[str, torch.Tensor], norm: PixelNorm, dtype: torch.dtype) -> ImageTensors:
        """With the layout of the patches."""
        layout = {name: tensor for name, tensor in images.items() if name not in self.image_inputs}
        return layout | super().vision_inputs(images, norm, dtype)

    def encode_images(self, base: Any, inputs: ImageTensors) -> Any:
        """As the model's `get_image_features`, but without waiting for the device where the layout is known."""
        arguments = encoder_arguments(inputs)
        if "cu_seqlens" not in arguments:
            return super().encode_images(base, {name: inputs[name] for name in self.image_inputs})
        output = base.model.visual(inputs[PIXELS], grid_thw=inputs[GRID], return_dict=True, **arguments)
        tokens = [patches // base.config.vision_config.spatial_merge_size**2 for patches in image_patches(inputs)]
        output.pooler_output = output.pooler_output.split(tokens)
        if hasattr(output, "deepstack_features"):
            output.deepstack_features = [layer.split(tokens) for layer in output.deepstack_features]
        return output

    def rows_per_image(self, config: Any, inputs: Mapping[str, torch.Tensor]) -> list[int]:
        """The patches of each image."""
        rows: list[int] = inputs[GRID].prod(-1).tolist()
        return rows

    def repeated_images(self, images: Mapping[str, torch.Tensor], copies: int, tokens: int) -> ImageTensors:
        """With the positions of every copy."""
        repeated = super().repeated_images(images, copies, tokens)
        return repeated | ({ROPE: images[ROPE].repeat(1, 1, copies)} if ROPE in images else {})

    def packed_positions(self, base: Any, batch: PairBatch) -> torch.Tensor:
        """The positions of the model's `get_rope_index`: [3, 1, T]."""
        if not batch.images:
            return batch.position_ids.expand(3, -1, -1)
        return batch.images[ROPE] if ROPE in batch.images else packed_rope_index(base, batch)

    def concatenated_inputs(self, batch: PairBatch) -> dict[str, Any]:
        """Positions; without them, which tokens are images, and the images' grids: twice where both rows of a pair have
        the same images."""
        if ROPE in batch.images:
            return {"position_ids": batch.images[ROPE]}
        inputs = {"mm_token_type_ids": (batch.token_kind == IMAGE).int()}
        grid = batch.images.get(GRID)
        if grid is None:
            return inputs
        return inputs | {GRID: grid.repeat(2, 1) if batch.images_shared else grid}


def packed_rope_index(base: Any, batch: PairBatch) -> torch.Tensor:
    """Multi-axis positions of each sequence of a packed row: [3, 1, T].

    The model is asked once for the whole row. Text continues by 1 on all axes, so the positions of each sequence are
    right but for an offset.
    """
    positions, _ = base.model.get_rope_index(
        batch.input_ids,
        mm_token_type_ids=(batch.token_kind == IMAGE).int(),
        image_grid_thw=batch.images.get(GRID),
    )
    found = torch.empty_like(positions)
    for branch in batch.branches:
        own = positions[..., branch.start : branch.end]
        first = found[..., branch.context[-1][1]].unsqueeze(-1) if branch.context else 0
        found[..., branch.start : branch.end] = own - own[..., :1] + first
    return found


QWEN_VL = QwenVL(
    vision=("model.visual.",),
    connector=("model.visual.merger.", "model.visual.deepstack_merger_list."),
    language=("model.language_model.",),
    image_inputs=("pixel_values", GRID),
)
