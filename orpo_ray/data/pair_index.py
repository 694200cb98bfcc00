"""Which sums over target tokens make up each pair. A sum counts for every pair that shares its tokens.

Legend: B pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from orpo_ray.data.forest import Forest


@dataclass(frozen=True)
class PairIndex:
    """The sums of each pair, by their numbers."""

    num_sums: int
    """Sums in all; some have no tokens."""
    chosen: torch.Tensor
    """int64 [B]: the sum of the chosen answer. If no other pair shares the prompt, the prompt's targets are part of it.
    """
    rejected: torch.Tensor
    """int64 [B]: the sum of the rejected answer."""
    other: torch.Tensor | None = None
    """int64 [B]: the sum of the chosen answer to other images, without tokens where a pair has none; None if no pair
    has other images."""
    prompts: torch.Tensor | None = None
    """int64 [B, parts]: the sums of those parts of the prompt that other pairs share, without tokens where a pair has
    fewer of them; None if no part is shared, or no prompt token is a target."""

    @classmethod
    def separate(cls, num_pairs: int, answers_per_pair: int) -> PairIndex:
        """The index of pairs that share nothing: sum i is chosen answer i, sum B + i rejected answer i, and so on."""
        chosen, rejected, *other = torch.arange(answers_per_pair * num_pairs).split(num_pairs)
        return cls(answers_per_pair * num_pairs, chosen, rejected, *other)

    @classmethod
    def of(cls, forest: Forest, prompt_targets: bool) -> PairIndex:
        """The index of a packed row.

        Args:
            forest: the trees of the row.
            prompt_targets: whether tokens of prompts are targets.
        """
        pairs = len(forest.prompts_of)
        sides = range(0, forest.num_sides, pairs)
        index = cls(
            forest.num_sums,
            *(torch.tensor([forest.sum_of.get(side, side) for side in range(s, s + pairs)]) for s in sides),
        )
        shared = [[node.sum for node in nodes if node.is_shared] for nodes in forest.prompts_of]
        parts = max(map(len, shared))
        if not prompt_targets or not parts:
            return index
        empty = forest.num_sums
        prompts = torch.tensor([sums + [empty] * (parts - len(sums)) for sums in shared])
        return replace(index, num_sums=empty + 1, prompts=prompts)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PairIndex:
        """The same index with every tensor changed."""

        def optional(sums: torch.Tensor | None) -> torch.Tensor | None:
            return None if sums is None else change(sums)

        chosen, rejected = change(self.chosen), change(self.rejected)
        return replace(
            self, chosen=chosen, rejected=rejected, other=optional(self.other), prompts=optional(self.prompts)
        )

    def repeated(self, copies: int) -> PairIndex:
        """The index of several copies of a batch: copy k has the sums k * num_sums and on."""
        copy = torch.arange(copies, device=self.chosen.device) * self.num_sums

        def repeat(sums: torch.Tensor) -> torch.Tensor:
            return (sums + copy.view(-1, *[1] * sums.ndim)).flatten(0, 1)

        return replace(self.map(repeat), num_sums=copies * self.num_sums)
