"""Families whose language model looks at images by cross-attention: their vision part, and their rows.

What their own forward does, but for two things: an image is encoded once per pair, and rows with other numbers of
images do not change each other.

Legend: R rows, T tokens a row, n images of all pairs, N the most images of a row, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from orpo_ray.data.packing import PairBatch


def encode_cross_images(base: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Vision features of n images: Idefics [n, patches, D of the vision part], Mllama [n, tiles * patches, D]."""
    if base.config.model_type == "idefics":
        features: torch.Tensor = base.model.vision_model(**inputs).last_hidden_state
        return features
    # One row with an image for each.
    own = {name: value.unsqueeze(1) for name, value in inputs.items()}
    states = base.model.vision_model(**own).last_hidden_state  # [n, 1, tiles, patches, D]
    return base.model.multi_modal_projector(states).flatten(1, 3)


def cross_hidden_states(base: Any, batch: PairBatch, features: torch.Tensor | None) -> torch.Tensor:
    """The language model on the concatenated layout: [R, T, D]. features: of all images, None if there are none."""
    run = _idefics if base.config.model_type == "idefics" else _mllama
    hidden: torch.Tensor = run(base, batch, features)
    return hidden


def _idefics(base: Any, batch: PairBatch, features: torch.Tensor | None) -> torch.Tensor:
    if features is None:
        # It cannot do without; what nobody sees is as good.
        rows, width = batch.input_ids.shape
        size = base.config.vision_config.embed_dim
        by_row = torch.zeros(rows, 1, 1, size, dtype=base.dtype, device=batch.input_ids.device)
        mask = torch.zeros(rows, width, 1, dtype=torch.bool, device=batch.input_ids.device)
    else:
        by_row, mask = _by_row(batch, features), _both(batch, batch.images["cross_mask"]).bool()
    return base.model(
        input_ids=batch.input_ids, image_encoder_embeddings=by_row, image_attention_mask=mask, use_cache=False
    ).last_hidden_state


def _mllama(base: Any, batch: PairBatch, features: torch.Tensor | None) -> torch.Tensor:
    looks: dict[str, torch.Tensor] = {}
    if features is not None:
        by_row = _by_row(batch, features)  # [R, N, tiles * patches, D]
        seen = _both(batch, batch.images["cross_mask"]).bool()  # [R, T, N, tiles]
        sees = seen.flatten(2).any(-1)
        # A token before its first image looks at all of its row's alike (as in transformers), and so at no padding.
        # What a row without images has to look at is 0, and adds nothing.
        count = _both(batch, batch.images["images_per_row"])
        own = (torch.arange(seen.shape[2], device=count.device) < count.unsqueeze(1))[:, None, :, None]
        seen = torch.where(sees[:, :, None, None], seen, own)
        patches = by_row.shape[2] // seen.shape[3]
        hidden = ~seen.flatten(2).repeat_interleave(patches, 2).unsqueeze(1)
        bias = torch.zeros(hidden.shape, dtype=base.dtype, device=hidden.device)
        looks = {
            "cross_attention_states": by_row.flatten(1, 2),
            "cross_attention_mask": bias.masked_fill_(hidden, torch.finfo(base.dtype).min),
            "full_text_row_masked_out_mask": sees[:, None, :, None].to(base.dtype),
        }
    return base.model.language_model(input_ids=batch.input_ids, use_cache=False, **looks).last_hidden_state


def _by_row(batch: PairBatch, features: torch.Tensor) -> torch.Tensor:
    """[n, ...] -> [R, N, ...], 0 where a row has fewer images than another."""
    counts = batch.images["images_per_row"].tolist()
    rows = torch.nn.utils.rnn.pad_sequence(features.split(counts), batch_first=True)
    return _both(batch, rows)


def _both(batch: PairBatch, rows: torch.Tensor) -> torch.Tensor:
    """Rows of pairs as rows of answers: all chosen ones, then all rejected ones."""
    return torch.cat([rows, rows]) if batch.images_shared else rows
