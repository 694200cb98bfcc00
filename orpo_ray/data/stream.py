"""Ray Data: windows of rows -> encoded pairs -> one worker's share of every step, resumable at any slot.

Each worker runs a pipeline of its own over the slots that it owns: reading tasks (one a window) and encoding tasks
anywhere in the cluster, blocks in order through the object store. Ray's iterators have no position; the slots are it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from orpo_ray.data.encoding import EncodedPair, EncoderSpec, PairEncoder
from orpo_ray.data.formats import PreferencePair
from orpo_ray.data.order import step_slots
from orpo_ray.data.reading import ReadSpec, pair_of, read_window
from orpo_ray.errors import BadRow

# A block is one row, and that row a whole chunk of pairs: Ray Data merges small blocks and splits large ones at row
# borders, and a one-row block it can do neither to.
_CHUNK = pa.schema([("pairs", pa.large_binary())])
_ENCODED_CHUNK = pa.schema(
    [("slots", pa.list_(pa.int64())), ("pairs", pa.list_(pa.large_binary())), ("bad", pa.list_(pa.string()))]
)

# Reading takes little CPU. That it differs from encoding also keeps Ray Data from fusing the two into one task, which
# would encode a whole window in one process. Encoding asks for less than a core, so that it fits beside the workers
# of a small machine.
READ_CPUS = 0.01
ENCODE_CPUS = 0.5
READERS = 2  # windows that one worker's pipeline reads at a time
# Encoding yields to training where both run on the same cores: a thread of a CPU worker that loses its core to an
# encoder holds up all the others. It catches up whenever training waits. The variables give encoders processes of
# their own, so that no worker ever starts in one whose priority was lowered.
ENCODE_NICENESS = 10
ENCODE_ENV = {"env_vars": {"ORPO_RAY_ENCODER": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}}


@dataclass(frozen=True)
class BadRecord:
    """A row that was not trained on: a line of `bad_rows.jsonl`."""

    slot: int
    id: str
    source: str
    reason: str
    detail: str


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


def least_cpus(num_pipelines: int) -> float:
    """CPUs that must stay free for this many workers' pipelines to get on at all: one encoder, and all readers."""
    return ENCODE_CPUS + READERS * READ_CPUS * num_pipelines


def _iter_encoded(
    read: ReadSpec, encoder: EncoderSpec, max_encoders: int
) -> Iterator[dict[int, EncodedPair | BadRecord]]:
    windows = read.order.windows(read.first_slot, read.last_slot)
    dataset = ray.data.read_datasource(
        _WindowSource(read, windows), override_num_blocks=len(windows), num_cpus=READ_CPUS, concurrency=READERS
    ).map_batches(
        partial(_encode_chunk, encoder=encoder),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=ENCODE_CPUS,
        runtime_env=ENCODE_ENV,
        compute=ray.data.TaskPoolStrategy(max_encoders),
    )
    context = dataset.context
    context.target_max_block_size = 1  # one chunk a block
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What an encoding task raises on purpose (a processor that cannot be loaded) comes as itself.
    context.raise_original_map_exception = True
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        for chunk in block.to_pylist():
            yield dict(map(_arrived, chunk["slots"], chunk["pairs"], chunk["bad"]))


def _arrived(slot: int, pair: bytes | None, bad: str | None) -> tuple[int, EncodedPair | BadRecord]:
    if pair is None:
        assert bad is not None
        return slot, BadRecord(**json.loads(bad))
    return slot, EncodedPair.from_bytes(pair, slot)


def _pack_chunk(table: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.table({"pairs": pa.array([sink.getvalue().to_pybytes()], pa.large_binary())}, schema=_CHUNK)


def _encode_chunk(chunk: pa.Table, encoder: EncoderSpec) -> pa.Table:
    """One packed chunk of reading's `SCHEMA` -> one row of `_ENCODED_CHUNK`. A bad row ends here, not the task."""
    table = pa.ipc.open_stream(chunk["pairs"][0].as_buffer()).read_all()
    rows = table.to_pylist()
    encoded = _encode_rows(rows, _encoder_of_this_process(encoder))
    columns = {
        "slots": [row["slot"] for row in rows],
        "pairs": [None if isinstance(item, BadRow) else item.to_bytes() for item in encoded],
        "bad": [
            _record(row, item) if isinstance(item, BadRow) else None for row, item in zip(rows, encoded, strict=True)
        ],
    }
    return pa.Table.from_pylist([columns], schema=_ENCODED_CHUNK)


def _encode_rows(rows: list[dict[str, Any]], encoder: PairEncoder) -> list[EncodedPair | BadRow]:
    read = [pair_of(row) for row in rows]
    roots = [Path(row["image_root"]) if row["image_root"] else None for row in rows]
    good = [(pair, root) for pair, root in zip(read, roots, strict=True) if isinstance(pair, PreferencePair)]
    encoded = iter(encoder.encode_many([pair for pair, _ in good], [root for _, root in good]))
    return [pair if isinstance(pair, BadRow) else next(encoded) for pair in read]


def _record(row: dict[str, Any], bad: BadRow) -> str:
    return json.dumps(vars(BadRecord(row["slot"], row["id"], row["source"], bad.reason, bad.detail)))


@lru_cache(maxsize=2)
def _encoder_of_this_process(spec: EncoderSpec) -> PairEncoder:
    lower_priority()
    return spec.build()


@cache
def lower_priority() -> None:
    """Make this process yield to others, once."""
    os.nice(ENCODE_NICENESS)


class _WindowSource(Datasource):
    """One read task a window, so that windows are read in parallel and none before its time."""

    def __init__(self, read: ReadSpec, windows: list[tuple[int, int]]) -> None:
        super().__init__()
        self._windows = windows
        self._read = ray.put(read)  # once, not with each task: it lists every segment of the set

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(partial(_read_chunks, self._read, *window), metadata) for window in self._windows]


def _read_chunks(read: ray.ObjectRef, epoch: int, number: int) -> Iterator[pa.Table]:
    yield from map(_pack_chunk, read_window(ray.get(read), epoch, number))
