"""Which token of a packed row sees which, as attention kernels need it: lengths, indices and masks.

A row is cut into branches: of a pair [prompt | chosen | rejected], [prompt | chosen] attends to itself, and [rejected]
attends to [prompt | rejected]; of several answers to a prompt, or prompts about an image, all but the first are such
branches. They are causal, so work that no answer needs is never done.

Legend: T tokens of the row; C tokens of a branch's context, L of its own tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F

from orpo_ray.data.branches import Branch
from orpo_ray.data.packing import IMAGE, PairBatch
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

    branches: Sequence[Branch]
    """The sequences of the row, in its order."""
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
        return cls(batch.branches, batch.token_kind, bidirectional, batch.varlen, group)

    @cached_property
    def lengths(self) -> list[int]:
        """Own tokens of each branch, L."""
        return [branch.end - branch.start for branch in self.branches]

    @cached_property
    def contexts(self) -> list[list[tuple[int, slice]]]:
        """Where each branch's context is: earlier branches, and which of their own tokens."""
        starts = [branch.start for branch in self.branches]

        def found(first: int, end: int) -> tuple[int, slice]:
            index = bisect_right(starts, first) - 1
            return index, slice(first - starts[index], end - starts[index])

        return [[found(*each) for each in branch.context] for branch in self.branches]

    @cached_property
    def varlen_index(self) -> VarlenIndex:
        """The branches as variable-length kernels take them."""
        return self.varlen or VarlenIndex.of(self.branches).to(self.token_kind.device)

    def row_sequences(self, window: int | None, dtype: torch.dtype) -> list[RowSequence]:
        """The branches as slices of the row, with additive masks of `dtype`."""
        key = (window, dtype)
        if key not in self._sequences:
            self._sequences[key] = [
                RowSequence(
                    slice(branch.start, branch.end),
                    tuple(slice(*each) for each in branch.ranges),
                    _additive(self._mask(branch, window), dtype),
                )
                for branch in self.branches
            ]
        return self._sequences[key]

    def mask(self, index: int, window: int | None) -> torch.Tensor | None:
        """What each own token of branch `index` sees of the context and of the own tokens.

        Returns:
            bool [L, C + L], True where seen, or None if the mask is plainly causal.
        """
        key = (index, window)
        if key not in self._masks:
            self._masks[key] = self._mask(self.branches[index], window)
        return self._masks[key]

    def _mask(self, branch: Branch, window: int | None) -> torch.Tensor | None:
        before, length = branch.context_tokens, branch.end - branch.start
        if self.bidirectional is None and not before and (window is None or length <= window):
            return None
        position = torch.arange(before + length, device=self.token_kind.device)
        queries = position[before:, None]
        causal = position <= queries
        inside = None if window is None else position > queries - window
        if self.bidirectional is None or branch.answer == branch.start:
            return causal if inside is None else causal & inside
        group = F.pad(self._bidirectional_groups(branch), (before, 0), value=-1)
        same_group = (group == group[before:, None]) & (group >= 0)
        if inside is None:
            return causal | same_group
        if self.bidirectional.within_window:
            return (causal | same_group) & inside
        return (causal & inside) | same_group

    def _bidirectional_groups(self, branch: Branch) -> torch.Tensor:
        """For each own token of a branch, the number of its group of tokens that see each other, or -1: int64 [L]."""
        assert self.bidirectional is not None
        if self.bidirectional.scope == "prompt":
            position = torch.arange(branch.start, branch.end, device=self.token_kind.device)
            return torch.where(position < branch.answer, 0, -1)
        is_image = self.token_kind[0, branch.start : branch.end] == IMAGE
        starts = is_image & ~F.pad(is_image, (1, 0))[:-1]
        return torch.where(is_image, starts.cumsum(0), -1)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Turn bool [q, k], True where seen, into [1, 1, q, k] to be added to scores: 0 where seen, -inf elsewhere."""
    if mask is None:
        return None
    return torch.zeros(1, 1, *mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
