"""The log-probs of both answers of pairs that are at hand, in the order of the pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from orpo_ray.data.encoding import EncodedPair, PairEncoder, Root
from orpo_ray.data.packing import PairBatch
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.errors import RowError
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.step_planner import StepPlanner

AT_ONCE = 16  # pairs that are encoded together


@dataclass(frozen=True)
class AnswerLogps:
    """Sums of the log-probs of both answers of a pair, and the number of tokens in each, as the chat template ends
    them."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int


@torch.no_grad()
def iter_answer_logps(
    pairs: Sequence[PreferencePair],
    roots: Sequence[Root],
    forward: Callable[[PairBatch], PairLogps],
    encoder: PairEncoder,
    planner: StepPlanner,
) -> Iterator[AnswerLogps | RowError]:
    """Yield the log-probs of each pair, in order; a RowError for one that the model cannot take.

    Args:
        pairs: the pairs.
        roots: for each pair, the folder that its image paths are relative to.
        forward: runs the model on a batch.
        encoder: encodes pairs for it.
        planner: divides them into batches.
    """
    for first in range(0, len(pairs), AT_ONCE):
        encoded = encoder.encode_many(pairs[first : first + AT_ONCE], roots[first : first + AT_ONCE])
        usable = [replace(each, sample_index=place) for place, each in enumerate(encoded)
                  if isinstance(each, EncodedPair)]  # fmt: skip
        found = _logps_of(usable, forward, planner) if usable else {}
        yield from (each if isinstance(each, RowError) else found[place] for place, each in enumerate(encoded))


def _logps_of(
    pairs: list[EncodedPair], forward: Callable[[PairBatch], PairLogps], planner: StepPlanner
) -> dict[int, AnswerLogps]:
    """Return the log-probs of pairs by their sample indices."""
    found: dict[int, AnswerLogps] = {}
    share = planner.share(pairs)
    for batch, asked in zip(planner.plan(share).batches, share.microbatches, strict=True):
        logps = forward(batch.to(planner.device)).cpu()
        columns = (logps.chosen, logps.rejected, logps.chosen_tokens.int(), logps.rejected_tokens.int())
        rows = zip(*(column.tolist() for column in columns), strict=True)
        found |= {pair.sample_index: AnswerLogps(*next(rows)) for pair in asked}  # dummy pairs come last
    return found
