"""EncodedPairs -> `PairBatch`: micro-batches under a token budget, and the tensors of one forward.

Legend: B pairs in a micro-batch, T tokens of its longest row, M target tokens (those whose log-prob is wanted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from orpo_ray.data.encoding import EncodedPair


@dataclass(frozen=True)
class PairBatch:
    """One forward in the concatenated layout: row i is the chosen answer of pair i, row B + i the rejected one.

    input_ids: int64 [2B, T], padded on the right. Under a causal mask no real token sees the padding behind it, so
    there is no attention mask.
    target_position: int64 [M], into the flattened [2B * T] hidden states: the token before each target.
    target_ids: int64 [M]. target_row: int64 [M], the row of each. target_in_response: bool [M].
    weights: float32 [B], 1 for a pair, 0 for a filler. slots: the pairs' slots, [B].
    images: the vision input of all pairs, each image once; empty if none has an image.
    trains_on_images: whether any of it belongs to a pair, not just to a filler.
    """

    input_ids: torch.Tensor
    target_position: torch.Tensor
    target_ids: torch.Tensor
    target_row: torch.Tensor
    target_in_response: torch.Tensor
    weights: torch.Tensor
    images: dict[str, torch.Tensor]
    slots: tuple[int, ...]
    trains_on_images: bool

    @property
    def num_pairs(self) -> int:
        """B, fillers included."""
        return len(self.weights)

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: value.to(device) for k, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved, images={name: value.to(device) for name, value in self.images.items()})


def build_batch(pairs: Sequence[EncodedPair], nll: str, fillers: Sequence[EncodedPair] = ()) -> PairBatch:
    """The tensors of one forward over `pairs` and, with weight 0, `fillers`. nll: `response | prompt+response`."""
    everything = [*pairs, *fillers]
    rows = [np.concatenate([p.prompt_ids, p.chosen_ids]) for p in everything]
    rows += [np.concatenate([p.prompt_ids, p.rejected_ids]) for p in everything]
    width = max(len(row) for row in rows)
    input_ids = np.zeros((len(rows), width), np.int64)
    positions, target_rows, in_response = [], [], []
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
        pair = everything[index % len(everything)]
        start = len(pair.prompt_ids)
        columns = np.arange(start, len(row))
        if nll == "prompt+response" and index < len(everything):
            # The very first token has nothing before it that could predict it.
            prompt = 1 + np.flatnonzero(pair.prompt_is_text[1:])
            columns = np.concatenate([prompt, columns])
        positions.append(index * width + columns - 1)
        target_rows.append(np.full(len(columns), index))
        in_response.append(columns >= start)
    position = torch.from_numpy(np.concatenate(positions))
    ids = torch.from_numpy(input_ids)
    return PairBatch(
        input_ids=ids,
        target_position=position,
        target_ids=ids.flatten()[position + 1],
        target_row=torch.from_numpy(np.concatenate(target_rows)),
        target_in_response=torch.from_numpy(np.concatenate(in_response)),
        weights=torch.tensor([1.0] * len(pairs) + [0.0] * len(fillers)),
        images=_collate_images(everything),
        slots=tuple(pair.slot for pair in everything),
        trains_on_images=any(pair.images for pair in pairs),
    )


def plan_microbatches(pairs: Sequence[EncodedPair], token_budget: int) -> list[list[EncodedPair]]:
    """Cut a worker's share of a step: rows of like length together, 2 * B * T within the budget where B > 1."""
    batches: list[list[EncodedPair]] = []
    for pair in sorted(pairs, key=lambda pair: -pair.row_length):
        # Sorted, so the first pair of a batch is its longest.
        if batches and 2 * (len(batches[-1]) + 1) * batches[-1][0].row_length <= token_budget:
            batches[-1].append(pair)
        else:
            batches.append([pair])
    return batches


def spread(batches: list[list[EncodedPair]], count: int) -> list[list[EncodedPair]]:
    """The same pairs in exactly `count` micro-batches, halving the largest; some stay empty if pairs run out."""
    batches = [list(batch) for batch in batches]
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]), default=-1)
        if largest < 0 or len(batches[largest]) < 2:
            batches += [[] for _ in range(count - len(batches))]
            break
        batch = batches[largest]
        middle = (len(batch) + 1) // 2
        batches[largest : largest + 1] = [batch[:middle], batch[middle:]]
    return batches


def nll_token_count(pair: EncodedPair, nll: str) -> int:
    """How many tokens the NLL term of this pair covers; the first prompt token is never a target."""
    prompt = int(pair.prompt_is_text[1:].sum()) if nll == "prompt+response" else 0
    return prompt + len(pair.chosen_ids)


def _collate_images(pairs: Sequence[EncodedPair]) -> dict[str, torch.Tensor]:
    """Tiles of all pairs one after another. A mask that only some have is all ones for the others."""
    with_images = [pair.images for pair in pairs if pair.images]
    names = {name for images in with_images for name in images}
    out: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        parts = [images[name] if name in images else _full_mask(images["pixel_values"]) for images in with_images]
        out[name] = torch.from_numpy(np.concatenate(parts))
    return out


def _full_mask(pixels: np.ndarray) -> np.ndarray:
    return np.ones((pixels.shape[0], *pixels.shape[-2:]), np.int64)
