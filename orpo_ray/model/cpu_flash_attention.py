"""torch's CPU flash attention over the parts of a packed row, written straight into the row.

The same numbers as scaled_dot_product_attention part by part under autograd, without its copies: no joined keys kept
per pair, no parts of the output kept beside the whole, gradients added where they belong. A fresh page costs a CPU as
much as the arithmetic on it.

Legend: T tokens of the row, H query heads, K key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Part:
    """Queries of the row and the keys that they may see, as places in it.

    mask: additive, of the states' dtype [1, 1, queries, keys], or None if plainly causal.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor | None


class CpuFlashAttention(torch.autograd.Function):
    """query [1, T, H, D], key and value [1, T, K, D] -> [1, T, H, D]. The parts' queries cover the row."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: Sequence[Part],
        scale: float | None,
    ) -> torch.Tensor:
        out = torch.empty(query.shape, dtype=query.dtype)
        lses = []
        for part in parts:
            q, k, v = _states_of(part, query, key, value)
            attended, lse = _forward(q, k, v, is_causal=part.mask is None, attn_mask=part.mask, scale=scale)
            out[:, part.queries] = attended.transpose(1, 2)
            lses.append(lse)
        ctx.save_for_backward(query, key, value, out, *lses)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, *lses = ctx.saved_tensors
        d_query = torch.empty(query.shape, dtype=query.dtype)
        d_key, d_value = torch.zeros(key.shape, dtype=key.dtype), torch.zeros(value.shape, dtype=value.dtype)
        for part, lse in zip(ctx.parts, lses, strict=True):
            q, k, v = _states_of(part, query, key, value)
            d_out, attended = (states[:, part.queries].transpose(1, 2) for states in (gradient, out))
            mask = part.mask
            dq, dk, dv = _backward(d_out, q, k, v, attended, lse, 0.0, mask is None, attn_mask=mask, scale=ctx.scale)
            d_query[:, part.queries] = dq.transpose(1, 2)
            lengths = [place.stop - place.start for place in part.keys]
            for whole, own in ((d_key, dk.transpose(1, 2)), (d_value, dv.transpose(1, 2))):
                for place, piece in zip(part.keys, own.split(lengths, dim=1), strict=True):
                    whole[:, place] += piece
        return d_query, d_key, d_value, None, None


def _states_of(part: Part, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """The part's queries, keys and values, [1, heads, tokens, D]."""

    def gather(states: torch.Tensor) -> torch.Tensor:
        pieces = [states[:, place] for place in part.keys]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    return [states.transpose(1, 2) for states in (query[:, part.queries], gather(key), gather(value))]
