"""Attention of vision encoders that put the patches of all images in one row.

The row is cut into sequences, images or windows of images, and a patch sees all patches of its own sequence. The
encoders' own code under scaled_dot_product_attention splits the row in every layer by lengths read back from the device
and calls the kernel once per window (Qwen2.5-VL), or builds a mask of the row squared (Pixtral).

transformers gives the sequences' borders only to an attention with "flash" in its name, and looks on the hub for any
such name that `from_pretrained` is given. So the name is set in the config of the loaded model (`use_in`).

Legend: N patches of the row, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from orpo_ray.errors import OrpoRayError
from orpo_ray.model.attention_kernel import Hardware, choose_kernel

NAME = "orpo_ray_vision_flash"
# Vision encoders (`vision_config.model_type`) that the tests show equal to their own attention.
PACKED_ENCODERS = {"qwen2_5_vl", "qwen2_5_vl_vision", "qwen3_vl", "qwen3_vl_vision", "pixtral"}
# Arguments that encoders hand down to attention and that change nothing here.
_IGNORED = {
    "is_causal", "output_attentions", "output_hidden_states", "return_dict", "use_cache", "cu_seq_lens_k",
    "max_length_k",
}  # fmt: skip


@dataclass(frozen=True)
class PatchSequences:
    """Sequences of a row of patches, with their lengths in main memory, so that no layer waits for the device."""

    starts: torch.Tensor
    """int32 [sequences + 1], on the row's device: where each sequence begins. The encoder hands this tensor down."""
    lengths: tuple[int, ...]
    """Patches of each sequence."""


def use_in(model: Any, name: str = NAME) -> None:
    """Make this the attention of the model's vision encoder, if it is one of `PACKED_ENCODERS`.

    Args:
        model: the transformers model.
        name: under which it is registered, if not as `NAME`.
    """
    vision: Any = getattr(model.config, "vision_config", None)
    if getattr(vision, "model_type", None) in PACKED_ENCODERS:
        if name == NAME:
            register()
        vision._attn_implementation = name


def register() -> None:
    """Make `NAME` an attention implementation that transformers knows."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, vision_attention)


def vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    patch_sequences: Sequence[PatchSequences] = (),
    hardware: Hardware | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers calls it.

    Args:
        module: the attention layer, for messages.
        query: [1, H, N, D], as key and value.
        key: see query.
        value: see query.
        attention_mask: must be None.
        scaling: factor on scores; None means D ** -0.5.
        dropout: probability of dropping an attention weight.
        cu_seq_lens_q: int32 [sequences + 1], where each sequence begins.
        max_length_q: patches of the longest sequence.
        patch_sequences: those whose lengths are known on the host; other lengths are read back where they are needed.
        hardware: what to choose the kernel for; by default the device of `query`.
        others: what else the layer hands down.

    Returns:
        The attended values [1, N, H, D], and None for the weights, which are never computed.

    Raises:
        OrpoRayError: the layer wants something that this attention does not do.
    """
    unknown = {name for name, value in others.items() if value is not None} - _IGNORED
    if attention_mask is not None or cu_seq_lens_q is None or unknown:
        wants = ", ".join(sorted(unknown)) or ("a mask" if attention_mask is not None else "no sequences")
        raise OrpoRayError(
            f"attention '{NAME}' does not support {type(module).__name__}, which passes {wants}; this version of "
            "transformers was not tested"
        )
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]  # [N, H, D]
    kernel = choose_kernel(hardware or Hardware.of(query.device), query.dtype, query.shape[-1], dropout=dropout)
    if kernel == "varlen":
        return _attend_varlen(rows, cu_seq_lens_q, max_length_q, scaling), None
    known = next((each.lengths for each in patch_sequences if each.starts is cu_seq_lens_q), None)
    lengths = cu_seq_lens_q.diff().tolist() if known is None else known
    return _attend_runs(rows, lengths, scaling, dropout), None


def _attend_varlen(
    rows: Sequence[torch.Tensor], starts: torch.Tensor, longest: int | None, scaling: float | None
) -> torch.Tensor:
    """Run one flash kernel over all sequences."""
    # Imported here because it imports torch's compiler, which takes seconds that a CPU run need not spend.
    from torch.nn.attention import varlen

    query, key, value = (row.contiguous() for row in rows)
    most = int(starts.diff().max()) if longest is None else longest
    out = varlen.varlen_attn(query, key, value, starts, starts, most, most, scale=scaling)
    assert isinstance(out, torch.Tensor)
    return out.unsqueeze(0)


def _attend_runs(
    rows: Sequence[torch.Tensor], lengths: Sequence[int], scaling: float | None, dropout: float
) -> torch.Tensor:
    """Call scaled_dot_product_attention once for each run of neighbors of equal length."""
    runs = [(length, sum(1 for _ in run)) for length, run in groupby(lengths)]
    out = []
    for (length, count), *states in zip(
        runs, *(row.split([length * count for length, count in runs]) for row in rows), strict=True
    ):
        query, key, value = (each.unflatten(0, (count, length)).transpose(1, 2) for each in states)
        attended = F.scaled_dot_product_attention(query, key, value, None, dropout, scale=scaling)
        out.append(attended.transpose(1, 2).flatten(0, 1))
    return (out[0] if len(out) == 1 else torch.cat(out)).unsqueeze(0)
