"""Workers that compute one packed row together: each has some of its tokens, and in attention some of its heads.

This is the method of DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509). All layers but attention compute tokens
independently, so each worker runs them on its own tokens. Before attention, workers exchange queries, keys and values,
after which each has all tokens of some heads; so whatever the row's layout lets a token see, attention is as on one
worker. Afterwards they exchange back.

A worker has every n-th token rather than a run of them: target tokens, for which the output head is computed, are then
divided evenly, wherever the answers lie.

Legend: n workers of the group, T tokens of the row, t = T / n rounded up, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from orpo_ray.data.packing import PairBatch
from orpo_ray.errors import UserError

FIELD = "scaling.sequence_parallel"


@dataclass(frozen=True)
class SequenceGroup:
    """The group of this worker."""

    size: int
    """n, at least 2."""
    member: int
    """This worker's place in the group."""
    handle: Any
    """torch's process group."""

    @classmethod
    def join(cls, size: int, timeout_s: float) -> SequenceGroup:
        """Form groups of `size` workers of consecutive ranks, mostly of one node. A collective of all workers.

        Args:
            size: workers of a group.
            timeout_s: how long a collective waits for a worker that lags behind.

        Raises:
            UserError: the number of workers is no multiple of it.
        """
        rank, workers = dist.get_rank(), dist.get_world_size()
        if workers % size:
            raise UserError(
                f"{workers} worker(s) cannot form groups of {size}",
                field=FIELD,
                value=size,
                fix="set scaling.num_workers to a multiple of it",
            )
        timeout = timedelta(seconds=timeout_s)
        handles = [dist.new_group(list(range(first, first + size)), timeout) for first in range(0, workers, size)]
        return cls(size, rank % size, handles[rank // size])

    def own(self, row: torch.Tensor, dim: int) -> torch.Tensor:
        """This worker's tokens of a row, t along `dim`. Padding at the end of the row is 0."""
        dim %= row.ndim
        missing = -row.shape[dim] % self.size
        padded = F.pad(row, (0, 0) * (row.ndim - 1 - dim) + (0, missing)) if missing else row
        return padded.unflatten(dim, (-1, self.size)).select(dim + 1, self.member)

    def with_own_targets(self, batch: PairBatch) -> PairBatch:
        """The same packed row with those targets only that follow this worker's tokens.

        To be called while the batch is in main memory: how many they are depends on values, for which the host would
        wait on a GPU.
        """
        own = batch.target_position % self.size == self.member
        return replace(
            batch,
            target_position=batch.target_position[own] // self.size,
            target_ids=batch.target_ids[own],
            target_sum=batch.target_sum[own],
            target_in_response=batch.target_in_response[own],
            workers=self.size,
        )

    def attend(
        self,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tokens: int,
    ) -> torch.Tensor:
        """Compute attention over the whole row.

        Args:
            attend: [1, H / n, T, D], [1, K / n, T, D] twice -> [1, T, H / n, D].
            query: [1, H, t, D], of this worker's tokens.
            key: [1, K, t, D]. With fewer heads than workers, each is sent to all workers that need it.
            value: [1, K, t, D].
            tokens: T.

        Returns:
            [1, t, H, D].
        """
        heads = [self._with_all_tokens(states, tokens) for states in (query, key, value)]
        return self._with_all_heads(attend(*heads))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up over the group. A gradient of the sum is the gradient of each worker's values."""
        total: torch.Tensor = _Sum.apply(values, self)
        return total

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """The largest of the workers' values, without a gradient."""
        largest = value.detach().clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.handle)
        return largest

    def all_to_all(self, received: torch.Tensor, parts: torch.Tensor) -> None:
        """Send part i of [n, ...] to worker i, and receive as much from each."""
        dist.all_to_all_single(received, parts, group=self.handle)

    def all_reduce(self, values: torch.Tensor) -> None:
        """Add up over the group, in place."""
        dist.all_reduce(values, group=self.handle)

    def _with_all_tokens(self, states: torch.Tensor, tokens: int) -> torch.Tensor:
        """[1, heads, t, D] -> [1, heads / n, T, D]."""
        if states.shape[1] < self.size:
            states = states.repeat_interleave(self.size // states.shape[1], 1)
        received = self._exchanged(states[0].unflatten(0, (self.size, -1)))  # [n, heads / n, t, D], by owner of tokens
        return received.permute(1, 2, 0, 3).flatten(1, 2)[None, :, :tokens]

    def _with_all_heads(self, attended: torch.Tensor) -> torch.Tensor:
        """[1, T, H / n, D] -> [1, t, H, D]."""
        missing = -attended.shape[1] % self.size
        row = F.pad(attended[0], (0, 0, 0, 0, 0, missing)) if missing else attended[0]
        received = self._exchanged(row.unflatten(0, (-1, self.size)).transpose(0, 1))  # [n, t, H / n, D], by heads
        return received.transpose(0, 1).flatten(1, 2).unsqueeze(0)

    def _exchanged(self, parts: torch.Tensor) -> torch.Tensor:
        exchanged: torch.Tensor = _Exchange.apply(parts, self)
        return exchanged


def check_heads(text_config: Any, size: int) -> None:
    """Check that a language model's heads can be divided among the workers of a group.

    Args:
        text_config: the language model's config in transformers.
        size: workers of a group.

    Raises:
        UserError: they cannot.
    """
    queries = int(text_config.num_attention_heads)
    keys = int(getattr(text_config, "num_key_value_heads", None) or queries)
    possible = [n for n in range(2, queries + 1) if queries % n == 0 and (keys % n == 0 or n % keys == 0)]
    if size not in possible:
        raise UserError(
            f"the language model has {queries} attention heads and {keys} key-value heads, which cannot be divided "
            f"among {size} workers",
            field=FIELD,
            value=size,
            fix=f"use one of {', '.join(map(str, possible))}" if possible else "set it to 1",
        )


class _Exchange(torch.autograd.Function):
    """An all-to-all, whose gradient goes the same ways back."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchanged(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        total = values.clone()
        group.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _exchanged(parts: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    group.all_to_all(received, parts)
    return received
