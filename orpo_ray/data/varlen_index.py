"""The sequences of a packed row as variable-length attention kernels take them, made while the batch is built.

Legend: T tokens of the row; C tokens of a branch's context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from orpo_ray.data.branches import Branch
from orpo_ray.data.transfer import to_device


@dataclass(frozen=True)
class VarlenIndex:
    """The sequences of a row, for kernels that take sequences of different lengths."""

    keys: torch.Tensor
    """int64 [T + sum of C]: indices into the row, with the context of each branch repeated before its own tokens."""
    cu_queries: torch.Tensor
    """int32 [sequences + 1]: where the queries of each sequence begin in the row."""
    cu_keys: torch.Tensor
    """int32 [sequences + 1]: where the keys of each sequence begin in `keys`. Queries align with the last keys."""
    longest_query: int
    """Most queries of a sequence, in tokens."""
    longest_key: int
    """Most keys of a sequence, in tokens."""

    @classmethod
    def of(cls, branches: Sequence[Branch]) -> VarlenIndex:
        """Make the index from the branches of the row."""
        keys = [np.concatenate([np.arange(*each) for each in branch.ranges]) for branch in branches]
        queries = [branch.end - branch.start for branch in branches]

        def starts(lengths: Sequence[int]) -> torch.Tensor:
            return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)

        key_lengths = [len(indices) for indices in keys]
        index = torch.from_numpy(np.concatenate(keys))
        return cls(index, starts(queries), starts(key_lengths), max(queries), max(key_lengths))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> VarlenIndex:
        """The same index with every tensor changed."""
        keys, cu_queries, cu_keys = (change(each) for each in (self.keys, self.cu_queries, self.cu_keys))
        return replace(self, keys=keys, cu_queries=cu_queries, cu_keys=cu_keys)

    def repeated(self, copies: int, tokens: int) -> VarlenIndex:
        """The index of a row of several copies of this one. Made on the device, which nothing waits for.

        Args:
            copies: how many.
            tokens: T.
        """
        copy = torch.arange(copies, device=self.keys.device).unsqueeze(1)

        def starts(first: torch.Tensor, length: int) -> torch.Tensor:
            return torch.cat([first[:1], (first[1:] + copy * length).flatten()]).to(first.dtype)

        return replace(
            self,
            keys=(self.keys + copy * tokens).flatten(),
            cu_queries=starts(self.cu_queries, tokens),
            cu_keys=starts(self.cu_keys, len(self.keys)),
        )

    def to(self, device: torch.device) -> VarlenIndex:
        """The same index on a device."""
        return self.map(partial(to_device, device=device))
