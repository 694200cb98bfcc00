"""Attention over [prompt | chosen | rejected] in one row: each answer sees the prompt and itself, no pair another.

The row is cut into sequences. Of every pair, [prompt | chosen] attends to itself, and [rejected] to [prompt |
rejected]; both causally, so that what no answer needs is never computed. Registered with transformers by name; the
layout comes as an extra argument of the model's forward, which transformers hands down to every layer.

Legend: T tokens of the row, H query heads, K key heads, D head dimension; P, C, R tokens of a pair's prompt, chosen
and rejected answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from orpo_ray.data.packing import IMAGE, PairBatch, PairSpan
from orpo_ray.errors import OrpoRayError
from orpo_ray.model.cpu_flash_attention import CpuFlashAttention, Part
from orpo_ray.model.families import Bidirectional

NAME = "orpo_ray_shared_prefix"
# What models hand down to attention that changes nothing in it.
_HARMLESS = {"is_causal", "output_attentions", "output_hidden_states", "position_ids", "return_dict", "use_cache"}


def register() -> None:
    """Make `NAME` an attention implementation that transformers knows."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


@dataclass
class PrefixLayout:
    """What attention must know of one packed row. Made once per forward; masks and indices are shared by the layers.

    token_kind: int64 [1, T], on the row's device. bidirectional: which tokens of a prompt see those behind them.
    """

    spans: Sequence[PairSpan]
    token_kind: torch.Tensor
    bidirectional: Bidirectional | None = None
    _masks: dict[Any, torch.Tensor | None] = field(default_factory=dict)
    _parts: dict[Any, list[Part]] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: PairBatch, bidirectional: Bidirectional | None) -> PrefixLayout:
        """The layout of a packed batch."""
        return cls(batch.spans, batch.token_kind, bidirectional)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each pair's [prompt | chosen] and [rejected], in the order of the row."""
        return [n for span in self.spans for n in (span.rejected - span.start, span.end - span.rejected)]

    @cached_property
    def sequences(self) -> VarlenIndex:
        """The same sequences as variable-length kernels take them."""
        return VarlenIndex.of(self.spans, self.token_kind.device)

    def chosen_mask(self, index: int, window: int | None) -> torch.Tensor | None:
        """Of pair `index`, bool [P + C, P + C]: what each token of [prompt | chosen] sees; None if plainly causal."""
        span = self.spans[index]
        length = span.rejected - span.start
        if self.bidirectional is None and (window is None or length <= window):
            return None
        return self._cached(("chosen", index, window), lambda: self._chosen_mask(span, length, window))

    def rejected_mask(self, index: int, window: int | None) -> torch.Tensor:
        """Of pair `index`, bool [R, P + R]: what each rejected token sees of [prompt | rejected]."""
        span = self.spans[index]
        prompt, length = span.chosen - span.start, span.end - span.rejected
        mask = self._cached(("rejected", index, window), lambda: self._rejected_mask(prompt, length, window))
        assert mask is not None
        return mask

    def parts(self, window: int | None, dtype: torch.dtype) -> list[Part]:
        """The same sequences as places in the row, with additive masks."""
        key = ("parts", window, dtype)
        if key not in self._parts:
            self._parts[key] = [part for index in range(len(self.spans)) for part in self._pair(index, window, dtype)]
        return self._parts[key]

    def _pair(self, index: int, window: int | None, dtype: torch.dtype) -> list[Part]:
        span = self.spans[index]
        chosen, rejected = slice(span.start, span.rejected), slice(span.rejected, span.end)
        parts = [Part(chosen, (chosen,), _additive(self.chosen_mask(index, window), dtype))]
        if not span.is_single:
            keys = (slice(span.start, span.chosen), rejected)
            parts.append(Part(rejected, keys, _additive(self.rejected_mask(index, window), dtype)))
        self._masks.clear()  # the additive ones are enough
        return parts

    def _cached(self, key: Any, make: Any) -> torch.Tensor | None:
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]

    def _chosen_mask(self, span: PairSpan, length: int, window: int | None) -> torch.Tensor:
        place = torch.arange(length, device=self.token_kind.device)
        mask = place <= place[:, None]
        inside = mask if window is None else place > place[:, None] - window
        if self.bidirectional is None:
            return mask & inside
        block = self._blocks(span, length)
        same_block = (block == block[:, None]) & (block >= 0)
        if self.bidirectional.within_window:
            return (mask | same_block) & (inside if window is not None else True)
        return (mask & inside) | same_block

    def _rejected_mask(self, prompt: int, length: int, window: int | None) -> torch.Tensor:
        keys = torch.arange(prompt + length, device=self.token_kind.device)
        queries = keys[prompt:, None]
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)

    def _blocks(self, span: PairSpan, length: int) -> torch.Tensor:
        """Of each token of [prompt | chosen], the number of the bidirectional block that it belongs to, or -1."""
        assert self.bidirectional is not None
        place = torch.arange(length, device=self.token_kind.device)
        if self.bidirectional.what == "prompt":
            return torch.where(place < span.chosen - span.start, 0, -1)
        is_image = self.token_kind[0, span.start : span.rejected] == IMAGE
        starts = is_image & ~F.pad(is_image, (1, 0))[:-1]
        return torch.where(is_image, starts.cumsum(0), -1)


@dataclass(frozen=True)
class VarlenIndex:
    """The sequences of a row for kernels over variable lengths.

    keys: int64 [T + sum of P], the row's tokens with each prompt once more before its rejected answer.
    cu_queries, cu_keys: int32 [sequences + 1], where sequences begin; a query sees the keys up to its own, counted
    from the end. longest_query, longest_key: tokens.
    """

    keys: torch.Tensor
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, spans: Sequence[PairSpan], device: torch.device) -> VarlenIndex:
        """From the pairs' places in the row."""
        keys: list[np.ndarray] = []
        queries: list[int] = []
        for span in spans:
            prompt = np.arange(span.start, span.chosen)
            keys.append(np.arange(span.start, span.rejected))
            queries.append(span.rejected - span.start)
            if not span.is_single:
                keys.append(np.concatenate([prompt, np.arange(span.rejected, span.end)]))
                queries.append(span.end - span.rejected)

        def starts(lengths: Sequence[int]) -> torch.Tensor:
            return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)

        key_lengths = [len(part) for part in keys]
        index = torch.from_numpy(np.concatenate(keys)).to(device)
        return cls(index, starts(queries), starts(key_lengths), max(queries), max(key_lengths))


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prefix: PrefixLayout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function. query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D].

    sliding_window: how many tokens back a token sees, itself included. softcap: scores become
    softcap * tanh(scores / softcap).
    """
    if shared_prefix is None:
        raise OrpoRayError(
            f"a model with attention '{NAME}' was called without the layout of its row; "
            "to call it directly: model.set_attn_implementation('sdpa')"
        )
    if unknown := sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS):
        raise OrpoRayError(
            f"attention '{NAME}' does not know what {type(module).__name__} wants with {', '.join(unknown)}; "
            "set model.attention to concatenated"
        )
    if softcap is None and dropout == 0.0:
        if query.device.type == "cpu":
            states = (each.transpose(1, 2) for each in (query, key, value))
            parts = shared_prefix.parts(sliding_window, query.dtype)
            return CpuFlashAttention.apply(*states, parts, scaling), None
        if shared_prefix.bidirectional is None and _varlen_takes(query):
            return by_varlen(query, key, value, scaling, sliding_window, shared_prefix.sequences), None
    return by_segment(query, key, value, dropout, scaling, sliding_window, softcap, shared_prefix), None


def _varlen_takes(query: torch.Tensor) -> bool:
    """Whether the variable-length flash kernel can: compute capability 8.0, and `varlen_shape`."""
    return query.is_cuda and varlen_shape(query) and torch.cuda.get_device_capability(query.device) >= (8, 0)


def varlen_shape(query: torch.Tensor) -> bool:
    """Whether it takes such queries: 16 bits, heads of a multiple of 8."""
    return query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def by_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    index: VarlenIndex,
) -> torch.Tensor:
    """One flash kernel over all sequences."""
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    out = varlen.varlen_attn(
        queries.contiguous(),
        keys.index_select(0, index.keys),
        values.index_select(0, index.keys),
        index.cu_queries,
        index.cu_keys,
        index.longest_query,
        index.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out.unsqueeze(0)


def by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    layout: PrefixLayout,
) -> torch.Tensor:
    """Two calls of torch's scaled_dot_product_attention per pair."""
    # As [1, T, heads, D], which is how it lies in memory: parts are whole blocks, and joining them is one copy. split,
    # not slices: the gradient of a slice is as large as the row, so that time would grow with the pairs squared.
    queries, keys, values = (states.transpose(1, 2).split(layout.lengths, dim=1) for states in (query, key, value))
    out = []
    for index, span in enumerate(layout.spans):
        first, second, prompt = 2 * index, 2 * index + 1, span.chosen - span.start
        mask = layout.chosen_mask(index, window)
        out.append(_attend(queries[first], keys[first], values[first], mask, dropout, scaling, softcap))
        if span.is_single:
            continue
        key_, value_ = (torch.cat([s[first][:, :prompt], s[second]], dim=1) for s in (keys, values))
        mask = layout.rejected_mask(index, window)
        out.append(_attend(queries[second], key_, value_, mask, dropout, scaling, softcap))
    return torch.cat(out, dim=1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """One sequence; mask None means causal. query [1, q, H, D], key and value [1, k, K, D] -> [1, q, H, D]."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if softcap is None and mask is None:
        return F.scaled_dot_product_attention(
            query, key, value, None, dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1
        ).transpose(1, 2)
    # With a mask, CUDA's fused kernels take no grouped heads.
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling).transpose(1, 2)
    # No fused kernel caps scores.
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """bool [q, k], true where seen -> [1, 1, q, k] to be added to scores."""
    if mask is None:
        return None
    return torch.zeros(1, 1, *mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout says who sees whom; transformers need not make a mask of [T, T]."""
