"""Attention over packed rows: each answer sees its prompt and itself, and no answer sees another.

Registered with transformers under `NAME`, so no model is patched. The layout of the row comes as an extra argument of
the model's forward (`shared_prefix=`), which transformers hands down to every layer.

Legend: T tokens of the row, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from orpo_ray.data.varlen_index import VarlenIndex
from orpo_ray.errors import OrpoRayError
from orpo_ray.model.attention_kernel import AttentionKernel, Hardware, choose_kernel
from orpo_ray.model.cpu_flash_attention import CpuFlashAttention
from orpo_ray.model.prefix_layout import PrefixLayout

NAME = "orpo_ray_shared_prefix"
# Arguments that models hand down to attention and that change nothing here.
_IGNORED = {"is_causal", "output_attentions", "output_hidden_states", "position_ids", "return_dict", "use_cache"}


@dataclass(frozen=True)
class ScoreOptions:
    """How attention scores are computed. The defaults are those of scaled_dot_product_attention."""

    scaling: float | None = None
    """Factor on scores; None means D ** -0.5."""
    window: int | None = None
    """How many tokens back a token sees, itself included; None means all."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap)."""
    dropout: float = 0.0
    """Probability of dropping an attention weight."""


def register() -> None:
    """Make `NAME` an attention implementation that transformers knows."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, no_mask)


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
    hardware: Hardware | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers calls it.

    Args:
        module: the attention layer, for messages.
        query: [1, H, T, D]; in a `SequenceGroup`, of the worker's own tokens.
        key: [1, K, T, D].
        value: [1, K, T, D].
        attention_mask: ignored; the layout replaces it.
        dropout: see `ScoreOptions`, as for the next three.
        scaling: factor on scores.
        sliding_window: how many tokens back a token sees.
        softcap: cap on scores.
        shared_prefix: the layout of the row.
        hardware: what to choose the kernel for; by default the device of `query`.
        others: what else the layer hands down.

    Returns:
        The attended values [1, T, H, D], and None for the weights, which are never computed.

    Raises:
        OrpoRayError: there is no layout, or the layer wants something that this attention does not do.
    """
    if shared_prefix is None:
        raise OrpoRayError(
            f"a model with attention '{NAME}' was called without the layout of its row; "
            "to call it directly, first run model.set_attn_implementation('sdpa')"
        )
    if unknown := sorted(name for name, value in others.items() if value is not None and name not in _IGNORED):
        raise OrpoRayError(
            f"attention '{NAME}' does not support {', '.join(unknown)}, which {type(module).__name__} passes; "
            "set model.attention to concatenated"
        )
    kernel = choose_kernel(
        hardware or Hardware.of(query.device),
        query.dtype,
        query.shape[-1],
        bidirectional=shared_prefix.bidirectional is not None,
        softcap=softcap,
        dropout=dropout,
    )
    options = ScoreOptions(scaling, sliding_window, softcap, dropout)
    group = shared_prefix.group
    if group is None:
        return attend(kernel, query, key, value, shared_prefix, options), None
    tokens = shared_prefix.token_kind.shape[-1]
    return group.attend(partial(attend, kernel, layout=shared_prefix, options=options), query, key, value, tokens), None


def attend(
    kernel: AttentionKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PrefixLayout,
    options: ScoreOptions,
) -> torch.Tensor:
    """Run one kernel: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    if kernel == "cpu_flash":
        states = (each.transpose(1, 2) for each in (query, key, value))
        sequences = layout.row_sequences(options.window, query.dtype)
        out: torch.Tensor = CpuFlashAttention.apply(*states, sequences, options.scaling)
        return out
    if kernel == "varlen":
        return _attend_varlen(query, key, value, layout.varlen_index, options)
    return _attend_per_sequence(query, key, value, layout, options)


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: VarlenIndex, options: ScoreOptions
) -> torch.Tensor:
    """Run one flash kernel over all sequences."""
    # Imported here because it imports torch's compiler, which takes seconds that a CPU run need not spend.
    from torch.nn.attention import varlen

    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    out = varlen.varlen_attn(
        queries.contiguous(),
        keys.index_select(0, index.keys),
        values.index_select(0, index.keys),
        index.cu_queries,
        index.cu_keys,
        index.longest_query,
        index.longest_key,
        scale=options.scaling,
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out.unsqueeze(0)


def _attend_per_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PrefixLayout, options: ScoreOptions
) -> torch.Tensor:
    """Call torch's scaled_dot_product_attention for each branch."""
    # As [1, T, heads, D], which is how states lie in memory, each branch is contiguous and joining them is one copy.
    # split, not slices: the gradient of a slice is as large as the row, so time would grow with the pairs squared.
    queries, keys, values = (states.transpose(1, 2).split(layout.lengths, dim=1) for states in (query, key, value))
    out = []
    for index, context in enumerate(layout.contexts):
        mask = layout.mask(index, options.window)
        key_, value_ = (
            torch.cat([*(states[other][:, tokens] for other, tokens in context), states[index]], dim=1)
            if context
            else states[index]
            for states in (keys, values)
        )
        out.append(_attend_sequence(queries[index], key_, value_, mask, options))
    return torch.cat(out, dim=1)


def _attend_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: ScoreOptions
) -> torch.Tensor:
    """Attend within one sequence: query [1, q, H, D], key and value [1, k, K, D] -> [1, q, H, D].

    mask: bool [q, k], True where seen; None means causal.
    """
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    scaling, softcap, dropout = options.scaling, options.softcap, options.dropout
    if softcap is None and mask is None:
        return F.scaled_dot_product_attention(
            query, key, value, None, dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1
        ).transpose(1, 2)
    # With a mask, CUDA's fused kernels do not take grouped heads.
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


def no_mask(*_: Any, **__: Any) -> None:
    """Keep transformers from making a mask of [T, T]: the layout says which token sees which."""
