"""The steps of a run: each row is read and encoded once, and each step's pairs are distributed over the workers.

An encoding task yields small blocks of facts about its rows, and blocks with the encoded pairs. The feed looks at the
facts only; encoded pairs go straight from the task that made them to the worker that trains on them. Ray's iterators
have no position; the sample index is the position.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from orpo_ray.data.bad_rows import BAD_ROW_TYPE, BadRow
from orpo_ray.data.balance import Microbatches, Packing, PairSize, StepTotals, distribute
from orpo_ray.data.encoded_columns import ENCODED_TYPE, num_bytes, tensor_ids, to_arrow
from orpo_ray.data.encoding import EncodedPair, EncoderSpec
from orpo_ray.data.order import step_samples
from orpo_ray.data.ranking import split_ranking
from orpo_ray.data.reading import ReadSpec
from orpo_ray.streaming.pipeline import (
    encode_rows,
    encoder_batches,
    encoder_of_this_process,
    iter_block_refs,
    one_block,
)

# A worker on another node fetches whole blocks, so few pairs of a block should be for others. A single worker gets all
# pairs that were encoded together in one block: Ray Data pauses a task while a few of its blocks wait to be taken.
BYTES_PER_SHARED_BLOCK = 4 << 20

_FACT_TYPE = pa.struct(
    [
        ("sample_index", pa.int64()),
        ("block", pa.int64()),  # which of the blocks after these facts; null for a bad row
        ("place", pa.int64()),  # which of the block's pairs
        ("size", pa.list_(pa.int64())),  # `PairSize.numbers`; null for a bad row
        ("bad", BAD_ROW_TYPE),  # null for a pair
    ]
)


@dataclass(frozen=True)
class Portion:
    """A worker's share of a step, with references in place of its pairs; see `StepShare`."""

    step: int
    totals: StepTotals
    places: list[list[tuple[int, int]]]
    """Block, and place in it, of the pairs of each micro-batch."""
    blocks: list[ray.ObjectRef]
    bad: list[BadRow]


class StepFeed:
    """Hands out the steps of a run, in the process of its only worker or in an actor of all workers."""

    def __init__(
        self, read: ReadSpec, encoder: EncoderSpec, num_workers: int, max_encoders: int, together: int = 1
    ) -> None:
        """Start to read.

        Args:
            read: which rows; its `first_sample` is the first of a step.
            encoder: how pairs are encoded.
            num_workers: workers, each of which takes every step once.
            max_encoders: encoding tasks at a time.
            together: workers, of consecutive ranks, that take the same pairs (`scaling.sequence_parallel`).
        """
        self._read, self._num_workers, self._together = read, num_workers, together
        bytes_per_block = BYTES_PER_SHARED_BLOCK if num_workers > 1 else sys.maxsize
        work = partial(_encode, encoder=encoder, bytes_per_block=bytes_per_block)
        self._refs = iter_block_refs(read, work, max_encoders)
        self._arrived: dict[int, list[_Located | BadRow]] = {}  # by sample index; a ranked row has several pairs
        self._next_sample = read.first_sample
        self._failure: Exception | None = None
        self._steps: dict[int, _Step] = {}
        self._collecting, self._taking = threading.Lock(), threading.Lock()
        beginning = ThreadPoolExecutor(1)
        beginning.submit(self._begin)
        beginning.shutdown(wait=False)

    def take(self, rank: int, step: int, packing: Packing) -> Portion:
        """Return a worker's share of a step, as soon as all rows of the step are encoded.

        Raises an error of reading or encoding, the same for every worker.
        """
        if step not in self._steps:
            with self._collecting:
                if step not in self._steps:
                    self._steps[step] = self._collect(step, packing)
        with self._taking:
            found = self._steps[step]
            found.taken += 1
            if found.taken == self._num_workers:
                del self._steps[step]
        return found.portion(rank // self._together)

    def _begin(self) -> None:
        with self._collecting:
            if self._next_sample < self._read.end_sample:  # a resumed run may have no step left
                self._pull()

    def _collect(self, step: int, packing: Packing) -> _Step:
        first, end = step_samples(step, self._read.pairs_per_step, self._read.end_sample)
        while self._next_sample < end:
            self._pull()
        items = [item for sample_index in range(first, end) for item in self._arrived.pop(sample_index)]
        pairs = [item for item in items if isinstance(item, _Located)]
        bad = [item for item in items if isinstance(item, BadRow)]
        sizes = [pair.size for pair in pairs]
        microbatches = distribute(sizes, self._num_workers // self._together, packing)
        return _Step(step, StepTotals.of(sizes), pairs, microbatches, bad)

    def _pull(self) -> None:
        """Wait for the next rows that are encoded together."""
        if self._failure is not None:
            raise self._failure
        try:
            (facts,) = ray.get(next(self._refs))["facts"].to_pylist()
            count = max((fact["block"] + 1 for fact in facts if fact["block"] is not None), default=0)
            blocks = [next(self._refs) for _ in range(count)]
        except Exception as error:
            self._failure = error  # the next worker would find only that the pipeline has ended
            raise
        for fact in facts:
            items = self._arrived.setdefault(fact["sample_index"], [])
            if fact["bad"] is None:
                items.append(_Located(PairSize.from_numbers(fact["size"]), blocks[fact["block"]], fact["place"]))
            else:
                items.append(BadRow(**fact["bad"]))
            self._next_sample = fact["sample_index"] + 1


@dataclass(frozen=True)
class _Located:
    """A pair whose tensors are in a block."""

    size: PairSize
    block: ray.ObjectRef
    place: int
    """Which of the block's pairs."""


@dataclass
class _Step:
    step: int
    totals: StepTotals
    pairs: list[_Located]
    """In the order of their sample indices."""
    microbatches: Microbatches
    bad: list[BadRow]
    taken: int = 0
    """Number of workers that have their share."""

    def portion(self, share: int) -> Portion:
        blocks: dict[ray.ObjectRef, int] = {}
        own = [[self.pairs[index] for index in each] for each in self.microbatches[share]]
        places = [[(blocks.setdefault(item.block, len(blocks)), item.place) for item in each] for each in own]
        return Portion(self.step, self.totals, places, list(blocks), self.bad)


def _encode(task_batch: pa.Table, encoder: EncoderSpec, bytes_per_block: int) -> Iterator[pa.Table]:
    """Encode one task batch. A row that cannot be encoded becomes a BadRow and does not fail the task."""
    for batch in encoder_batches(task_batch):
        rows = [pair for row in batch for pair in split_ranking(row)]
        encoded = encode_rows(rows, encoder_of_this_process(encoder))
        yield from encoded_blocks([row["sample_index"] for row in rows], encoded, bytes_per_block)


def encoded_blocks(
    sample_indices: Sequence[int], items: Sequence[EncodedPair | BadRow], bytes_per_block: int
) -> Iterator[pa.Table]:
    """Yield a block of facts about some rows, then the blocks with the pairs among them."""
    facts: list[dict[str, Any]] = []
    groups: list[list[int]] = []
    size, stored = 0, set[int]()  # of the last group
    for place, (sample_index, item) in enumerate(zip(sample_indices, items, strict=True)):
        if isinstance(item, BadRow):
            facts.append({"sample_index": sample_index, "bad": vars(item)})
            continue
        if not groups or size + num_bytes(item, stored) > bytes_per_block:
            groups.append([])
            size, stored = 0, set()
        size += num_bytes(item, stored)
        stored |= tensor_ids(item)
        where = {"block": len(groups) - 1, "place": len(groups[-1])}
        facts.append({"sample_index": sample_index, **where, "size": PairSize.of(item).numbers})
        groups[-1].append(place)
    yield _block(pa.array(facts, _FACT_TYPE), pa.array([], ENCODED_TYPE))
    for group in groups:
        pairs = to_arrow([sample_indices[place] for place in group], [items[place] for place in group])  # type: ignore[misc]
        yield _block(pa.array([], _FACT_TYPE), pairs)


def _block(facts: pa.StructArray, pairs: pa.StructArray) -> pa.Table:
    """Make a block that no operator merges with others or splits: one row, with two lists. Copies nothing."""
    return one_block(pairs).append_column("facts", one_block(facts)[0])
