"""A worker of a group that computes a row together, in a dry run: there are no others, and what it sends is counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.planning.work import WorkCounter


@dataclass(frozen=True)
class PlannedGroup(SequenceGroup):
    """The group of such a worker."""

    handle: WorkCounter

    def all_to_all(self, received: torch.Tensor, parts: torch.Tensor) -> None:
        """Count what would be exchanged."""
        self.handle.exchange(parts)

    def all_reduce(self, values: torch.Tensor) -> None:
        """Do nothing: the sums are a few numbers per pair."""
