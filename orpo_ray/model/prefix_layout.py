"""Which token of a packed row sees which, as attention kernels need it: lengths, indices and masks.

A row holds [prompt | chosen | rejected] of several pairs. It is cut into sequences: of every pair, [prompt | chosen]
attends to itself, and [rejected] attends to [prompt | rejected]. Both are causal, so work that no answer needs is
never done.

Legend: T tokens of the row; P, C, R tokens of a pair's prompt, chosen answer and rejected answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F

from orpo_ray.data.packing import IMAGE, PairBatch
from orpo_ray.data.spans import PairSpan
from orpo_ray.data.varlen_index import VarlenIndex
from orpo_ray.model.cpu_flash_attention import RowSequence
from orpo_ray.model.sequence_group import SequenceGroup


@dataclass(frozen=True)
class Bidirectional:
    """Which tokens of a prompt also see later tokens."""

    scope: Literal["images", "prompt"]
    """`images`: the tokens of one image see each other. `prompt`: all tokens of the prompt do."""
    within_window: bool
    """Whether a sliding window limits that too."""


@dataclass
class PrefixLayout:
    """What attention must know of one packed row. Made once per forward; all layers share its masks and indices."""

    spans: Sequence[PairSpan]
    """Where the pairs lie in the row, in its order."""
    token_kind: torch.Tensor
    """int64 [1, T], on the row's device: TEXT, IMAGE or RESPONSE."""
    bidirectional: Bidirectional | None = None
    """Exceptions from the causal mask; None if there are none."""
    varlen: VarlenIndex | None = None
    """The sequences as variable-length kernels take them, on the row's device; None makes it on demand."""
    group: SequenceGroup | None = None
    """The workers that compute the row together; None if this one has all of it."""
    _masks: dict[Any, torch.Tensor | None] = field(default_factory=dict)
    _sequences: dict[Any, list[RowSequence]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, batch: PairBatch, bidirectional: Bidirectional | None, group: SequenceGroup | None = None
    ) -> PrefixLayout:
        """The layout of a packed batch."""
        return cls(batch.spans, batch.token_kind, bidirectional, batch.varlen, group)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each pair's [prompt | chosen] and [rejected], in the order of the row."""
        return [n for span in self.spans for n in (span.rejected - span.start, span.end - span.rejected)]

    @cached_property
    def varlen_index(self) -> VarlenIndex:
        """The sequences as variable-length kernels take them."""
        return self.varlen or VarlenIndex.of(self.spans).to(self.token_kind.device)

    def row_sequences(self, window: int | None, dtype: torch.dtype) -> list[RowSequence]:
        """The sequences as slices of the row, with additive masks of `dtype`."""
        key = (window, dtype)
        if key not in self._sequences:
            self._sequences[key] = [
                sequence for index in range(len(self.spans)) for sequence in self._pair_sequences(index, window, dtype)
            ]
        return self._sequences[key]

    def chosen_mask(self, index: int, window: int | None) -> torch.Tensor | None:
        """What each token of pair `index` sees within [prompt | chosen].

        Returns:
            bool [P + C, P + C], True where seen, or None if the mask is plainly causal.
        """
        span = self.spans[index]
        length = span.rejected - span.start
        if self.bidirectional is None and (window is None or length <= window):
            return None
        return self._cached(("chosen", index, window), lambda: self._chosen_mask(span, length, window))

    def rejected_mask(self, index: int, window: int | None) -> torch.Tensor:
        """What each rejected token of pair `index` sees of [prompt | rejected]: bool [R, P + R], True where seen."""
        span = self.spans[index]
        prompt, length = span.chosen - span.start, span.end - span.rejected
        mask = self._cached(("rejected", index, window), lambda: self._rejected_mask(prompt, length, window))
        assert mask is not None
        return mask

    def _pair_sequences(self, index: int, window: int | None, dtype: torch.dtype) -> list[RowSequence]:
        span = self.spans[index]
        chosen, rejected = slice(span.start, span.rejected), slice(span.rejected, span.end)
        sequences = [RowSequence(chosen, (chosen,), _additive(self.chosen_mask(index, window), dtype))]
        if not span.is_single:
            keys = (slice(span.start, span.chosen), rejected)
            sequences.append(RowSequence(rejected, keys, _additive(self.rejected_mask(index, window), dtype)))
        self._masks.clear()  # the additive masks are enough
        return sequences

    def _cached(self, key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]

    def _chosen_mask(self, span: PairSpan, length: int, window: int | None) -> torch.Tensor:
        position = torch.arange(length, device=self.token_kind.device)
        causal = position <= position[:, None]
        inside = causal if window is None else position > position[:, None] - window
        if self.bidirectional is None:
            return causal & inside
        group = self._bidirectional_groups(span, length)
        same_group = (group == group[:, None]) & (group >= 0)
        if self.bidirectional.within_window:
            return (causal | same_group) & (inside if window is not None else True)
        return (causal & inside) | same_group

    def _rejected_mask(self, prompt: int, length: int, window: int | None) -> torch.Tensor:
        keys = torch.arange(prompt + length, device=self.token_kind.device)
        queries = keys[prompt:, None]
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)

    def _bidirectional_groups(self, span: PairSpan, length: int) -> torch.Tensor:
        """For each token of [prompt | chosen], the number of its group of tokens that see each other, or -1."""
        assert self.bidirectional is not None
        if self.bidirectional.scope == "prompt":
            position = torch.arange(length, device=self.token_kind.device)
            return torch.where(position < span.chosen - span.start, 0, -1)
        is_image = self.token_kind[0, span.start : span.rejected] == IMAGE
        starts = is_image & ~F.pad(is_image, (1, 0))[:-1]
        return torch.where(is_image, starts.cumsum(0), -1)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Turn bool [q, k], True where seen, into [1, 1, q, k] to be added to scores: 0 where seen, -inf elsewhere."""
    if mask is None:
        return None
    return torch.zeros(1, 1, *mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
