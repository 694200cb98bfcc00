"""Hidden states -> log-probs of target tokens, in chunks, so that [tokens, vocabulary] never exists whole.

The output head is called once for all chunks. Under ZeRO-3 each call of a module gathers its weights from all workers,
and a number of calls that differs between batches or workers would end prefetching, or a worker would wait for a gather
that the others do not make.

Legend: B pairs, M target tokens, m target tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from orpo_ray.data.pair_index import PairIndex

# Most bytes for the logits of one chunk if they are float32, by the type of the device. A chunk reads the whole weight
# of the head, which a GPU does at a fraction of the speed of its arithmetic.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**30}
# Most bytes of such a chunk that log-softmax processes at once. On a CPU, few rows fit its caches.
BLOCK_BYTES, CPU_ROWS = 2**26, 16


@dataclass(frozen=True)
class PairLogps:
    """Sums of log-probs per pair, and the number of tokens in each sum; all float32 [B]."""

    chosen: torch.Tensor
    """Log-prob of the chosen answer."""
    rejected: torch.Tensor
    """Log-prob of the rejected answer."""
    nll: torch.Tensor
    """Negative log-prob of the tokens under the NLL term, a subset of prompt + chosen answer."""
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    nll_tokens: torch.Tensor
    other: torch.Tensor | None = None
    """Log-prob of the chosen answer to the other images, 0 where a pair has none; None if no pair has."""
    other_tokens: torch.Tensor | None = None
    """0 where a pair has no other images."""

    def cpu(self) -> PairLogps:
        """The same in main memory, in one transfer."""
        return self.changed(torch.Tensor.cpu)

    def split(self, copies: int) -> list[PairLogps]:
        """The sums of each copy of a batch that was repeated (`PairBatch.repeated`)."""
        parts = [[None] * copies if sums is None else sums.chunk(copies) for sums in vars(self).values()]
        return [PairLogps(*each) for each in zip(*parts, strict=True)]

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PairLogps:
        """The same after a change of all sums at once: [6, B], or [8, B] with other images."""
        return PairLogps(*change(torch.stack([sums for sums in vars(self).values() if sums is not None])))


def sum_by_pair(
    logps: torch.Tensor, target_sum: torch.Tensor, target_in_response: torch.Tensor, pairs: PairIndex
) -> PairLogps:
    """Add up log-probs of tokens by pair. Tokens that several pairs share are added up once, and count for each pair.

    Args:
        logps: [M], log-prob of each target token.
        target_sum: int64 [M], the sum that each token counts for.
        target_in_response: bool [M], False for prompt tokens, which count for the NLL only.
        pairs: the sums of each pair.
    """
    logps, response = logps.float(), target_in_response.float()

    def sums(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(pairs.num_sums).index_add(0, target_sum, values)

    def answers(sums: torch.Tensor) -> list[torch.Tensor]:
        return [sums.index_select(0, of) for of in (pairs.chosen, pairs.rejected, pairs.other) if of is not None]

    def prompt_and_chosen(sums: torch.Tensor) -> torch.Tensor:
        own = sums.index_select(0, pairs.chosen)
        return own if pairs.prompts is None else own + sums.take(pairs.prompts).sum(1)

    chosen, rejected, *other = answers(sums(logps * response))
    chosen_tokens, rejected_tokens, *other_tokens = answers(sums(response))
    nll, nll_tokens = (prompt_and_chosen(sums(values)) for values in (logps, torch.ones_like(logps)))
    return PairLogps(chosen, rejected, -nll, chosen_tokens, rejected_tokens, nll_tokens, *other, *other_tokens)


def count_chunks(num_targets: int, vocab_size: int, device_type: str) -> int:
    """Number of chunks in which the output head processes this many target tokens."""
    most = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"])
    return max(1, -(-num_targets * 4 * vocab_size // most))


def target_logps(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, target_ids: torch.Tensor, chunks: int
) -> torch.Tensor:
    """Compute the log-probs of target tokens.

    Args:
        head: Maps hidden states [m, D] to logits [m, V] in a new tensor, which backward overwrites.
        hidden: [M, D], hidden state before each target token.
        target_ids: int64 [M].
        chunks: Number of calls of `head`; all chunks but the last call it once more in backward.

    Returns:
        float32 [M].
    """
    hidden_chunks, id_chunks = hidden.tensor_split(chunks), target_ids.tensor_split(chunks)
    logps = [
        checkpoint(_chunk_logps, head, *chunk, use_reentrant=False)
        for chunk in zip(hidden_chunks[:-1], id_chunks[:-1], strict=True)
    ]
    # Backward starts with the last chunk and would recompute its logits at once, so the chunk keeps them.
    logps.append(_chunk_logps(head, hidden_chunks[-1], id_chunks[-1]))
    return torch.cat(logps)


def _chunk_logps(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, target_ids: torch.Tensor
) -> torch.Tensor:
    logps: torch.Tensor = _SelectiveLogSoftmax.apply(head(hidden), target_ids)
    return logps


class _SelectiveLogSoftmax(torch.autograd.Function):
    """Log-softmax in float32, then one entry of each row.

    torch's own holds three tensors [m, V] in backward. This one holds only the logits and overwrites them with their
    gradient, since the head that made them no longer needs them. Blocks of rows are converted to float32 one at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        sums = torch.cat([few.float().logsumexp(-1) for few in logits.split(_rows_at_once(logits))])
        ctx.save_for_backward(logits, ids, sums)
        return logits.gather(1, ids.unsqueeze(1)).squeeze(1).float() - sums

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """d logp[id] / d logits = onehot(id) - softmax."""
        logits, *by_row = ctx.saved_tensors
        rows = _rows_at_once(logits)
        blocks = zip(logits.split(rows), *(each.split(rows) for each in (*by_row, gradient)), strict=True)
        for few, ids, total, weight in blocks:
            out = few.float()  # not a copy if the logits are float32
            out.sub_(total.unsqueeze(1)).exp_().mul_(-weight.unsqueeze(1))
            out.scatter_add_(1, ids.unsqueeze(1), weight.unsqueeze(1))
            if out is not few:
                few.copy_(out)
        return logits, None


def _rows_at_once(logits: torch.Tensor) -> int:
    return CPU_ROWS if logits.device.type == "cpu" else max(1, BLOCK_BYTES // (4 * logits.shape[1]))
