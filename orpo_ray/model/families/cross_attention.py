"""Idefics and Mllama: the language model looks at images by cross-attention, so no image token stands for one.

This does what the models' own forward does, with two differences: an image is encoded once per pair, and rows with
different numbers of images do not change each other.

Legend: R rows, T tokens of a row, P prompt tokens, n images of all pairs, N most images of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from orpo_ray.data.collate_images import PIXELS, ImageArrays, TokenRows
from orpo_ray.data.packing import PairBatch
from orpo_ray.model.families.base import Family, ImageFeatures, ImageTensors
from orpo_ray.model.families.llava_like import PREFIXES
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.processing.prompts import TOKEN_MASKS

# Added by `collate`: uint8 [R, T, N, ...], which of its row's images a token sees, and int64 [R], images of each row.
CROSS_MASK, IMAGES_PER_ROW = "cross_mask", "images_per_row"


class CrossAttentionFamily(Family):
    """Always in the concatenated layout."""

    def why_not_shared_prefix(self, config: Any) -> str | None:
        """Cross-attention layers would need their own layout."""
        return "its language model looks at images by cross-attention"

    def can_cache_images(self, config: Any) -> bool:
        """The features are not those that the language model's rows take."""
        return False

    def collate(self, inputs: Sequence[ImageArrays], rows: TokenRows) -> dict[str, np.ndarray]:
        """Put all images one after another, with the mask of which token sees which.

        An answer sees what its prompt's last token sees, as when it is generated.
        """
        with_images = [images for images in inputs if images]
        (mask_name,) = (name for name in TOKEN_MASKS if name in with_images[0])
        counts = [len(images[PIXELS]) if images else 0 for images in inputs]
        mask = np.zeros((len(inputs), rows.width, max(counts), *with_images[0][mask_name].shape[2:]), np.uint8)
        for row, (images, count) in enumerate(zip(inputs, counts, strict=True)):
            if images:
                own = images[mask_name]  # [P, images of the prompt, ...]
                mask[row, : len(own), :count] = own
                mask[row, len(own) :, :count] = own[-1]
        names = [name for name in with_images[0] if name != mask_name]
        tensors = {name: np.concatenate([images[name] for images in with_images]) for name in names}
        return tensors | {IMAGES_PER_ROW: np.asarray(counts), CROSS_MASK: mask}


class Idefics(CrossAttentionFamily):
    """The open Flamingo. Its perceiver, the connector, runs within the language model's forward."""

    def encode_images(self, base: Any, inputs: ImageTensors) -> Any:
        """Features [n, patches, D of the vision encoder]."""
        return SimpleNamespace(pooler_output=base.model.vision_model(**inputs).last_hidden_state)

    def hidden_states(self, base: Any, batch: PairBatch, images: ImageFeatures | None) -> torch.Tensor:
        """[R, T, D]."""
        if images is None:
            # The model needs images; one that no token sees changes nothing.
            rows, width = batch.input_ids.shape
            size = base.config.vision_config.embed_dim
            by_row = torch.zeros(rows, 1, 1, size, dtype=base.dtype, device=batch.input_ids.device)
            mask = torch.zeros(rows, width, 1, dtype=torch.bool, device=batch.input_ids.device)
        else:
            by_row, mask = _by_row(batch, images.features), _both_answers(batch, batch.images[CROSS_MASK]).bool()
        hidden: torch.Tensor = base.model(
            input_ids=batch.input_ids, image_encoder_embeddings=by_row, image_attention_mask=mask, use_cache=False
        ).last_hidden_state
        return hidden


class Mllama(CrossAttentionFamily):
    """Llama-3.2-Vision: up to four tiles an image, padded."""

    def vision_inputs(self, images: Mapping[str, torch.Tensor], norm: PixelNorm, dtype: torch.dtype) -> ImageTensors:
        """Tiles that an image does not have stay 0, as the processor pads after normalizing."""
        inputs = super().vision_inputs(images, norm, dtype)
        return inputs | {PIXELS: inputs[PIXELS] * inputs["aspect_ratio_mask"][..., None, None, None]}

    def encode_images(self, base: Any, inputs: ImageTensors) -> Any:
        """Features [n, tiles * patches, D], from one row with one image for each."""
        rows = {name: value.unsqueeze(1) for name, value in inputs.items()}
        states = base.model.vision_model(**rows).last_hidden_state  # [n, 1, tiles, patches, D of the vision encoder]
        return SimpleNamespace(pooler_output=base.model.multi_modal_projector(states).flatten(1, 3))

    def hidden_states(self, base: Any, batch: PairBatch, images: ImageFeatures | None) -> torch.Tensor:
        """[R, T, D]."""
        cross = {} if images is None else self._cross_inputs(base, batch, images.features)
        hidden: torch.Tensor = base.model.language_model(
            input_ids=batch.input_ids, use_cache=False, **cross
        ).last_hidden_state
        return hidden

    def _cross_inputs(self, base: Any, batch: PairBatch, features: torch.Tensor) -> dict[str, torch.Tensor]:
        by_row = _by_row(batch, features)  # [R, N, tiles * patches, D]
        seen = _both_answers(batch, batch.images[CROSS_MASK]).bool()  # [R, T, N, tiles]
        sees_any = seen.flatten(2).any(-1)
        # A token before its first image looks at all images of its row alike (as in transformers), but not at padding.
        # What a row without images looks at is 0 and adds nothing.
        count = _both_answers(batch, batch.images[IMAGES_PER_ROW])
        own = (torch.arange(seen.shape[2], device=count.device) < count.unsqueeze(1))[:, None, :, None]
        seen = torch.where(sees_any[:, :, None, None], seen, own)
        patches = by_row.shape[2] // seen.shape[3]
        hidden = ~seen.flatten(2).repeat_interleave(patches, 2).unsqueeze(1)
        bias = torch.zeros(hidden.shape, dtype=base.dtype, device=hidden.device)
        return {
            "cross_attention_states": by_row.flatten(1, 2),
            "cross_attention_mask": bias.masked_fill_(hidden, torch.finfo(base.dtype).min),
            "full_text_row_masked_out_mask": sees_any[:, None, :, None].to(base.dtype),
        }


def _by_row(batch: PairBatch, features: torch.Tensor) -> torch.Tensor:
    """[n, ...] -> [R, N, ...], 0 where a row has fewer images than another."""
    counts = batch.images[IMAGES_PER_ROW].tolist()
    rows = torch.nn.utils.rnn.pad_sequence(features.split(counts), batch_first=True)
    return _both_answers(batch, rows)


def _both_answers(batch: PairBatch, rows: torch.Tensor) -> torch.Tensor:
    """Turn rows of pairs into rows of answers: all chosen ones, then all rejected ones."""
    return torch.cat([rows, rows]) if batch.images_shared else rows


IDEFICS = Idefics(
    vision=("model.vision_model.",),
    connector=("model.perceiver_resampler.", "model.gated_cross_attn_layers."),
    language=("model.layers.", "model.embed_tokens.", "model.norm."),
)
MLLAMA = Mllama(
    **(PREFIXES | {"vision": ("model.vision_model.",)}),
    image_inputs=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
)
