"""One worker's share of every training step, out of its own pipeline, resumable at any slot.

Each worker runs a pipeline of its own over the slots that it owns, blocks in order. Ray's iterators have no position;
the slots are it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from orpo_ray.data.encoding import EncodedPair, EncoderSpec
from orpo_ray.data.order import step_slots
from orpo_ray.data.pipeline import (
    BadRecord,
    bad_record,
    encode_rows,
    encoder_of_this_process,
    iter_blocks,
    portions,
    unpack_rows,
)
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import BadRow

_ENCODED_CHUNK = pa.schema(
    [("slots", pa.list_(pa.int64())), ("pairs", pa.list_(pa.large_binary())), ("bad", pa.list_(pa.string()))]
)


@dataclass
class StepShare:
    """What one worker has of one step: its pairs in order of slots, and its bad rows."""

    step: int
    pairs: list[EncodedPair] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)


def iter_steps(
    read: ReadSpec, encoder: EncoderSpec, first_step: int, num_steps: int, max_encoders: int
) -> Iterator[StepShare]:
    """This worker's shares of steps first_step .. num_steps - 1; blocks are prefetched while a step computes.

    max_encoders: encoding tasks at a time, for this worker.
    """
    waiting: dict[int, EncodedPair | BadRecord] = {}
    arrivals = _iter_encoded(read, encoder, max_encoders)
    for step in range(first_step, num_steps):
        share = StepShare(step)
        slots = np.arange(*step_slots(step, read.pairs_per_step, read.last_slot))
        for slot in slots[read.owned(slots)].tolist():
            while slot not in waiting:
                waiting.update(next(arrivals))
            item = waiting.pop(slot)
            if isinstance(item, BadRecord):
                share.bad.append(item)
            else:
                share.pairs.append(item)
        yield share


def _iter_encoded(
    read: ReadSpec, encoder: EncoderSpec, max_encoders: int
) -> Iterator[dict[int, EncodedPair | BadRecord]]:
    for block in iter_blocks(read, partial(_encode_chunk, encoder=encoder), max_encoders, ordered=True):
        for chunk in range(block.num_rows):
            slots, pairs, bad = (block[name][chunk].values for name in ("slots", "pairs", "bad"))
            yield dict(map(_arrived, slots.to_pylist(), pairs, bad.to_pylist()))


def _arrived(slot: int, pair: pa.Scalar, bad: str | None) -> tuple[int, EncodedPair | BadRecord]:
    if bad is not None:
        return slot, BadRecord(**json.loads(bad))
    # Its pixels stay where they are, in the object store's shared memory, until they are packed.
    return slot, EncodedPair.from_bytes(pair.as_buffer(), slot)


def _encode_chunk(chunk: pa.Table, encoder: EncoderSpec) -> Iterator[pa.Table]:
    """One packed chunk of reading's `SCHEMA` -> rows of `_ENCODED_CHUNK`. A bad row ends here, not the task."""
    for rows in portions(unpack_rows(chunk)):
        encoded = encode_rows(rows, encoder_of_this_process(encoder))
        columns = {
            "slots": [row["slot"] for row in rows],
            "pairs": [None if isinstance(item, BadRow) else item.to_bytes() for item in encoded],
            "bad": [
                bad_record(row, item) if isinstance(item, BadRow) else None
                for row, item in zip(rows, encoded, strict=True)
            ],
        }
        yield pa.Table.from_pylist([columns], schema=_ENCODED_CHUNK)
