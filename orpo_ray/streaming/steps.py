"""One worker's shard of every training step, from its own Ray Data pipeline, resumable at any sample index.

Each worker runs a pipeline over the samples it owns, with blocks in order. Ray's iterators have no position; the
sample index is the position.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoded_columns import from_arrow, to_arrow
from orpo_ray.data.encoding import EncodedPair, EncoderSpec
from orpo_ray.data.order import step_samples
from orpo_ray.data.reading import ReadSpec
from orpo_ray.streaming.pipeline import (
    encode_rows,
    encoder_batches,
    encoder_of_this_process,
    iter_blocks,
    one_block,
    rows_of_blocks,
)


@dataclass
class StepShard:
    """One worker's rows of one step."""

    step: int
    pairs: list[EncodedPair] = field(default_factory=list)
    """In the order of their sample indices."""
    bad: list[BadRow] = field(default_factory=list)


def iter_steps(
    read: ReadSpec, encoder: EncoderSpec, first_step: int, num_steps: int, max_encoders: int
) -> Iterator[StepShard]:
    """Yield this worker's shards of steps first_step to num_steps - 1. Blocks are fetched ahead while a step computes.

    Args:
        read: which rows; its `first_sample` is the first of `first_step`.
        encoder: how pairs are encoded.
        first_step: the first step.
        num_steps: steps of the whole run.
        max_encoders: encoding tasks at a time, for this worker.
    """
    waiting: dict[int, EncodedPair | BadRow] = {}
    arrivals = _iter_encoded(read, encoder, max_encoders)
    for step in range(first_step, num_steps):
        shard = StepShard(step)
        sample_indices = np.arange(*step_samples(step, read.pairs_per_step, read.end_sample))
        for sample_index in sample_indices[read.owned(sample_indices)].tolist():
            while sample_index not in waiting:
                waiting.update(next(arrivals))
            item = waiting.pop(sample_index)
            if isinstance(item, BadRow):
                shard.bad.append(item)
            else:
                shard.pairs.append(item)
        yield shard


def started(steps: Iterator[StepShard]) -> Iterator[StepShard]:
    """Return the same steps, after a thread has begun to fetch the first one."""
    pool = ThreadPoolExecutor(1)
    first = pool.submit(next, steps, None)
    pool.shutdown(wait=False)

    def fetched() -> Iterator[StepShard]:
        shard = first.result()
        if shard is not None:
            yield shard
            yield from steps

    return fetched()


def _iter_encoded(read: ReadSpec, encoder: EncoderSpec, max_encoders: int) -> Iterator[dict[int, EncodedPair | BadRow]]:
    """Yield pairs and bad rows by sample index, a block at a time."""
    for blocks in iter_blocks(read, partial(_encode, encoder=encoder), max_encoders, ordered=True):
        yield from map(from_arrow, rows_of_blocks(blocks))


def _encode(task_batch: pa.Table, encoder: EncoderSpec) -> Iterator[pa.Table]:
    """Encode one task batch. A row that cannot be encoded becomes a BadRow and does not fail the task."""
    for rows in encoder_batches(task_batch):
        encoded = encode_rows(rows, encoder_of_this_process(encoder))
        yield one_block(to_arrow([row["sample_index"] for row in rows], encoded))
