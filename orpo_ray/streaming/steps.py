"""One worker's shard of every training step, from its own Ray Data pipeline, resumable at any sample index.

Each worker runs a pipeline over the samples it owns, with blocks in order. Ray's iterators have no position; the
sample index is the position.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from orpo_ray.data.bad_rows import BAD_ROW_TYPE, BadRow
from orpo_ray.data.encoding import EncodedPair, EncoderSpec
from orpo_ray.data.order import step_samples
from orpo_ray.data.reading import ReadSpec
from orpo_ray.streaming.pipeline import (
    encode_rows,
    encoder_of_this_process,
    iter_blocks,
    portions,
    unpack_rows,
)

_ENCODED_CHUNK = pa.schema(
    [("sample_indices", pa.list_(pa.int64())), ("pairs", pa.list_(pa.large_binary())), ("bad", pa.list_(BAD_ROW_TYPE))]
)


@dataclass
class StepShard:
    """What one worker has of one step: its pairs in order of sample indices, and its bad rows."""

    step: int
    pairs: list[EncodedPair] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


def iter_steps(
    read: ReadSpec, encoder: EncoderSpec, first_step: int, num_steps: int, max_encoders: int
) -> Iterator[StepShard]:
    """This worker's shares of steps first_step .. num_steps - 1; blocks are prefetched while a step computes.

    max_encoders: encoding tasks at a time, for this worker.
    """
    waiting: dict[int, EncodedPair | BadRow] = {}
    arrivals = _iter_encoded(read, encoder, max_encoders)
    for step in range(first_step, num_steps):
        share = StepShard(step)
        sample_indices = np.arange(*step_samples(step, read.pairs_per_step, read.end_sample))
        for sample_index in sample_indices[read.owned(sample_indices)].tolist():
            while sample_index not in waiting:
                waiting.update(next(arrivals))
            item = waiting.pop(sample_index)
            if isinstance(item, BadRow):
                share.bad.append(item)
            else:
                share.pairs.append(item)
        yield share


def started(steps: Iterator[StepShard]) -> Iterator[StepShard]:
    """The same steps, the first of which a thread fetches from now on."""
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
    for block in iter_blocks(read, partial(_encode_chunk, encoder=encoder), max_encoders, ordered=True):
        for chunk in range(block.num_rows):
            sample_indices, pairs, bad = (block[name][chunk].values for name in ("sample_indices", "pairs", "bad"))
            yield dict(map(_arrived, sample_indices.to_pylist(), pairs, bad.to_pylist()))


def _arrived(sample_index: int, pair: pa.Scalar, bad: dict[str, Any] | None) -> tuple[int, EncodedPair | BadRow]:
    if bad is not None:
        return sample_index, BadRow(**bad)
    # Its pixels stay where they are, in the object store's shared memory, until they are packed.
    return sample_index, EncodedPair.from_bytes(pair.as_buffer(), sample_index)


def _encode_chunk(chunk: pa.Table, encoder: EncoderSpec) -> Iterator[pa.Table]:
    """One packed chunk of reading's `SCHEMA` -> rows of `_ENCODED_CHUNK`. A bad row ends here, not the task."""
    for rows in portions(unpack_rows(chunk)):
        encoded = encode_rows(rows, encoder_of_this_process(encoder))
        columns = {
            "sample_indices": [row["sample_index"] for row in rows],
            "pairs": [None if isinstance(item, BadRow) else item.to_bytes() for item in encoded],
            "bad": [asdict(item) if isinstance(item, BadRow) else None for item in encoded],
        }
        yield pa.Table.from_pylist([columns], schema=_ENCODED_CHUNK)
