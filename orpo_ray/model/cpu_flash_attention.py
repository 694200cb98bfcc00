"""torch's CPU flash attention over the sequences of a packed row, written straight into the row.

The results equal those of scaled_dot_product_attention called per sequence under autograd, without its copies: no
joined keys are kept per pair, no outputs are kept beside the row, and gradients are added in place. On a CPU, touching
a fresh memory page costs as much as the arithmetic on it.

Legend: T tokens of the row, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class RowSequence:
    """A sequence of a packed row: queries, and the keys that they may see."""

    queries: slice
    """Positions of the queries in the row."""
    keys: tuple[slice, ...]
    """Positions of the keys in the row, in the sequence's order."""
    mask: torch.Tensor | None
    """[1, 1, queries, keys] of the states' dtype, added to scores; None if plainly causal."""


class CpuFlashAttention(torch.autograd.Function):
    """query [1, T, H, D], key and value [1, T, K, D] -> [1, T, H, D]. The sequences' queries must cover the row."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sequences: Sequence[RowSequence],
        scale: float | None,
    ) -> torch.Tensor:
        out = torch.empty(query.shape, dtype=query.dtype)
        lses = []
        for sequence in sequences:
            q, k, v = _states_of(sequence, query, key, value)
            mask = sequence.mask
            attended, lse = _forward(q, k, v, is_causal=mask is None, attn_mask=mask, scale=scale)
            out[:, sequence.queries] = attended.transpose(1, 2)
            lses.append(lse)
        ctx.save_for_backward(query, key, value, out, *lses)
        ctx.sequences, ctx.scale = sequences, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, *lses = ctx.saved_tensors
        d_query = torch.empty(query.shape, dtype=query.dtype)
        d_key, d_value = torch.zeros(key.shape, dtype=key.dtype), torch.zeros(value.shape, dtype=value.dtype)
        for sequence, lse in zip(ctx.sequences, lses, strict=True):
            q, k, v = _states_of(sequence, query, key, value)
            d_out, attended = (states[:, sequence.queries].transpose(1, 2) for states in (gradient, out))
            mask = sequence.mask
            dq, dk, dv = _backward(d_out, q, k, v, attended, lse, 0.0, mask is None, attn_mask=mask, scale=ctx.scale)
            d_query[:, sequence.queries] = dq.transpose(1, 2)
            lengths = [keys.stop - keys.start for keys in sequence.keys]
            for whole, own in ((d_key, dk.transpose(1, 2)), (d_value, dv.transpose(1, 2))):
                for keys, gradients in zip(sequence.keys, own.split(lengths, dim=1), strict=True):
                    whole[:, keys] += gradients
        return d_query, d_key, d_value, None, None


def _states_of(
    sequence: RowSequence, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> list[torch.Tensor]:
    """The sequence's queries, keys and values, each [1, heads, tokens, D]."""

    def gather(states: torch.Tensor) -> torch.Tensor:
        slices = [states[:, keys] for keys in sequence.keys]
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim=1)

    return [states.transpose(1, 2) for states in (query[:, sequence.queries], gather(key), gather(value))]
