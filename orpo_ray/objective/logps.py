"""Hidden states -> log-probs of the target tokens, in chunks, so that [tokens, vocabulary] never exists whole.

Legend: M target tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# What the logits of one chunk may take, as float32.
CHUNK_BYTES = 2**27


def count_chunks(num_targets: int, vocab_size: int) -> int:
    """Into how many parts this many targets are cut for the output head."""
    return max(1, -(-num_targets * 4 * vocab_size // CHUNK_BYTES))


def target_logps(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, target_ids: torch.Tensor, chunks: int
) -> torch.Tensor:
    """Log-probs of `target_ids` [M] given `hidden` [M, D]: float32 [M].

    head: hidden states [m, D] -> logits [m, V], a new tensor, which backward writes over; called `chunks` times, and
    all but once again in backward. Under ZeRO-3 each call gathers its weight from all workers, so `chunks` must be the
    same on each of them.
    """
    hidden_parts, id_parts = hidden.tensor_split(chunks), target_ids.tensor_split(chunks)
    parts = [
        checkpoint(_chunk_logps, head, *part, use_reentrant=False)
        for part in zip(hidden_parts[:-1], id_parts[:-1], strict=True)
    ]
    # Backward begins with the last chunk, where its logits would be computed anew at once: they may as well stay.
    parts.append(_chunk_logps(head, hidden_parts[-1], id_parts[-1]))
    return torch.cat(parts)


def _chunk_logps(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, target_ids: torch.Tensor
) -> torch.Tensor:
    logps: torch.Tensor = _SelectiveLogSoftmax.apply(head(hidden), target_ids)
    return logps


class _SelectiveLogSoftmax(torch.autograd.Function):
    """log_softmax in float32, then one entry of each row.

    torch's own holds three [m, V] in backward. This holds the logits alone and writes their gradient over them: the
    head, which made them, needs them no more. On a CPU it goes by few rows at a time, which stay in its caches.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = _rows_at_once(logits)
        sums = torch.cat([part.logsumexp(-1) for part in logits.float().split(rows)])
        ctx.save_for_backward(logits, ids, sums)
        return logits.gather(1, ids.unsqueeze(1)).squeeze(1).float() - sums

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """d logp[id] / d logits = onehot(id) - softmax."""
        logits, ids, sums = ctx.saved_tensors
        rows = _rows_at_once(logits)
        out = logits if logits.dtype == torch.float32 else logits.float()
        for part, total, weight in zip(out.split(rows), sums.split(rows), gradient.split(rows), strict=True):
            part.sub_(total.unsqueeze(1)).exp_().mul_(-weight.unsqueeze(1))
        out.scatter_add_(1, ids.unsqueeze(1), gradient.unsqueeze(1))
        return out.to(logits.dtype), None


def _rows_at_once(logits: torch.Tensor) -> int:
    return 16 if logits.device.type == "cpu" else max(1, len(logits))
