"""Ray Data: windows of rows -> chunks -> whatever encoding tasks make of them, anywhere in the cluster.

Reading tasks (one a window) and encoding tasks, blocks through the object store. What a chunk becomes is the caller's:
encoded pairs for training (`stream.py`), facts or clean rows for the `data` commands (`survey.py`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoding import EncodedPair, EncoderSpec, PairEncoder
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, pair_of, read_window, stored_bytes
from orpo_ray.errors import RowError
from orpo_ray.storage.files import image_folder

# A block is one row, and that row a whole chunk of pairs: Ray Data merges small blocks and splits large ones at row
# borders, and a one-row block it can do neither to.
_CHUNK = pa.schema([("pairs", pa.large_binary())])
# Reading takes little CPU. That it differs from encoding also keeps Ray Data from fusing the two into one task, which
# would encode a whole window in one process. Encoding asks for less than a core, so that it fits beside the workers
# of a small machine.
READ_CPUS = 0.01
ENCODE_CPUS = 0.5
# A block of encoded pairs: some 40 MB of pixels where they are photographs.
ROWS_PER_BLOCK = 32
BYTES_PER_BLOCK = 512 << 10
READERS = 1  # windows that one worker's pipeline reads at a time; each costs the run's start a process
# Encoding yields to training where both run on the same cores: a thread of a CPU worker that loses its core to an
# encoder holds up all the others. It catches up whenever training waits. The variables give encoders processes of
# their own, so that no worker ever starts in one whose priority was lowered.
ENCODE_NICENESS = 10
# Make the allocators keep freed memory: an image's tiles are 10 MB allocations, and fresh pages for each cost a tenth
# of the time.
KEEP_BYTES = str(256 << 20)
ENCODE_ENV = {
    "env_vars": {
        "ORPO_RAY_ENCODER": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": KEEP_BYTES,
        "MALLOC_TRIM_THRESHOLD_": KEEP_BYTES,
        "PILLOW_BLOCKS_MAX": "4",
    }
}


def least_cpus(num_pipelines: int) -> float:
    """CPUs that must stay free for this many workers' pipelines to get on at all: one encoder, and all readers."""
    return ENCODE_CPUS + READERS * READ_CPUS * num_pipelines


def iter_blocks(
    read: ReadSpec, work: Callable[[pa.Table], Iterator[pa.Table]], max_encoders: int, ordered: bool
) -> Iterator[pa.Table]:
    """What encoding tasks make of every chunk that this worker reads, handed on as soon as it is made."""
    windows = read.order.windows(read.first_sample, read.end_sample)
    dataset = ray.data.read_datasource(
        _WindowSource(read, windows),
        override_num_blocks=len(windows),
        num_cpus=READ_CPUS,
        concurrency=max(1, min(READERS, len(windows))),
        # In the encoders' processes: the one that has read a window goes on to encode it.
        ray_remote_args={"runtime_env": ENCODE_ENV},
    ).map_batches(
        work,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=ENCODE_CPUS,
        runtime_env=ENCODE_ENV,
        compute=ray.data.TaskPoolStrategy(max_encoders),
    )
    context = dataset.context
    context.target_max_block_size = 1  # one chunk a block
    context.execution_options.preserve_order = ordered
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What an encoding task raises on purpose (a processor that cannot be loaded) comes as itself.
    context.raise_original_map_exception = True
    # Where a command itself is the reader, Ray Data's own lines would stand between what it says.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def pack_rows(table: pa.Table) -> pa.Table:
    """A table as one row, which no operator merges with others or splits."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.table({"pairs": pa.array([sink.getvalue().to_pybytes()], pa.large_binary())}, schema=_CHUNK)


def unpack_rows(chunk: pa.Table) -> list[dict[str, Any]]:
    """The rows of `reading.SCHEMA` in a packed chunk."""
    rows: list[dict[str, Any]] = pa.ipc.open_stream(chunk["pairs"][0].as_buffer()).read_all().to_pylist()
    return rows


def portions(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A chunk's rows in parts of about one block: what waits together in the object store, and in a worker's hands."""
    part: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        part.append(row)
        size += stored_bytes(row)
        if len(part) >= ROWS_PER_BLOCK or size >= BYTES_PER_BLOCK:
            yield part
            part, size = [], 0
    if part:
        yield part


def encode_rows(rows: list[dict[str, Any]], encoder: PairEncoder) -> list[EncodedPair | BadRow]:
    """Encode rows of `reading.SCHEMA`, in their order; a row that cannot be used comes as a BadRow."""
    read = [pair_of(row) for row in rows]
    roots = [image_folder(row["image_root"]) for row in rows]
    good = [(pair, root) for pair, root in zip(read, roots, strict=True) if isinstance(pair, PreferencePair)]
    encoded = iter(encoder.encode_many([pair for pair, _ in good], [root for _, root in good]))
    out: list[EncodedPair | BadRow] = []
    for row, pair in zip(rows, read, strict=True):
        item = pair if isinstance(pair, BadRow) else next(encoded)
        if isinstance(item, RowError):
            item = BadRow.of(item, row["sample_index"], row["id"], row["source"])
        out.append(item)
    return out


@lru_cache(maxsize=2)
def encoder_of_this_process(spec: EncoderSpec) -> PairEncoder:
    """The encoder of a spec, made once a process; the process yields to others from then on."""
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
        self._read = ray.put(read)  # once, not with each task: it lists every shard of the set

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(partial(_read_chunks, self._read, *window), metadata) for window in self._windows]


def _read_chunks(read: ray.ObjectRef, epoch: int, number: int) -> Iterator[pa.Table]:
    yield from map(pack_rows, read_window(ray.get(read), epoch, number))
