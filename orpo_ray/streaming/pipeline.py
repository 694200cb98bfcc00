"""Ray Data pipelines: windows of rows -> task batches -> what encoding tasks make of them, anywhere in the cluster.

A reading task reads consecutive windows and cuts them into task batches; an encoding task takes one task batch. The
caller chooses what it makes of the rows: encoded pairs for training (`streaming/feed.py`), or facts and clean rows for
the `data` commands (`data_report/scan.py`). A run has one pipeline for all its workers, so that each row is read and
encoded once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any

import pyarrow as pa
import ray.data
from PIL import Image
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoding import EncodedPair, EncoderSpec, PairEncoder
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, pair_of, read_tasks, read_windows, stored_bytes
from orpo_ray.errors import OrpoRayError, RowError
from orpo_ray.storage.files import image_folder

# A block is one row that holds a list of rows. Ray Data merges small blocks and splits large ones, but never a row, so
# a task batch stays whole.
_ROWS = "rows"
# Reading takes little CPU. The two numbers also differ so that Ray Data does not fuse both into one task, which would
# encode a whole window in one process. Encoding asks for less than a core, so that it fits beside the workers of a
# small machine.
READ_CPUS = 0.01
ENCODE_CPUS = 0.5
# What an encoding task makes at a time: about 40 MB of pixels if they are photographs.
ROWS_PER_BLOCK = 32
BYTES_PER_BLOCK = 512 << 10
READERS = 1  # reading tasks at a time; each costs the run's start a process
# Encoding yields to training where both run on the same cores: if one thread of a CPU worker loses its core to an
# encoder, all other threads wait for it. Encoding catches up whenever training waits. The variables give encoders
# processes of their own, so that no worker starts in a process of lowered priority.
ENCODE_NICENESS = 10
ENCODE_ENV = {"env_vars": {"ORPO_RAY_ENCODER": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}}
# Encoders' allocators keep this much freed memory: an image's tiles are allocations of 10 MB, and fresh pages for each
# would cost a tenth of the time.
KEEP_BYTES = 256 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_PILLOW_BLOCKS = 4


def least_cpus(num_pipelines: int) -> float:
    """Return how many CPUs this many pipelines need to make progress: one encoder and all readers."""
    return ENCODE_CPUS + READERS * READ_CPUS * num_pipelines


def iter_blocks(
    read: ReadSpec, work: Callable[[pa.Table], Iterator[pa.Table]], max_encoders: int, ordered: bool
) -> Iterator[pa.Table]:
    """Yield the results of encoding tasks, as soon as they are available.

    Args:
        read: which rows.
        work: makes blocks of one row each out of one task batch, in an encoding task.
        max_encoders: encoding tasks at a time.
        ordered: whether blocks come in the order of their sample indices.
    """
    dataset = _dataset(read, work, max_encoders, ordered)
    with own_errors():
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def iter_block_refs(
    read: ReadSpec, work: Callable[[pa.Table], Iterator[pa.Table]], max_encoders: int
) -> Iterator[ray.ObjectRef]:
    """Yield references to the results of encoding tasks, in the order of their sample indices; see `iter_blocks`.

    The results stay where they are until a worker wants them.
    """
    with own_errors():
        for bundle in _dataset(read, work, max_encoders, ordered=True).iter_internal_ref_bundles():
            yield from (entry.ref for entry in bundle.blocks if entry.metadata.num_rows != 0)


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise an error of this package that a task raised as it was there. The text of Ray's copy is a traceback."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, OrpoRayError):
            raise cause from None
        raise


def _dataset(
    read: ReadSpec, work: Callable[[pa.Table], Iterator[pa.Table]], max_encoders: int, ordered: bool
) -> ray.data.Dataset:
    tasks = read_tasks(read)
    dataset = ray.data.read_datasource(
        _WindowSource(read, tasks),
        override_num_blocks=len(tasks),
        num_cpus=READ_CPUS,
        concurrency=max(1, min(READERS, len(tasks))),
        # In the encoders' processes: the one that has read a window goes on to encode it.
        runtime_env=ENCODE_ENV,
    ).map_batches(
        work,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=ENCODE_CPUS,
        runtime_env=ENCODE_ENV,
        compute=ray.data.TaskPoolStrategy(max_encoders),
    )
    if read.pipeline:
        # Ray's AutoscalingCoordinator keeps the room of a pipeline that was killed for three minutes, and gives a new
        # pipeline less than an encoder needs. A pipeline with the id of the killed one has its room at once.
        dataset._set_uuid(read.pipeline)
    dataset.context.target_max_block_size = 1  # one row is one block
    quiet(dataset, ordered)
    return dataset


def quiet(dataset: ray.data.Dataset, ordered: bool) -> None:
    """Let a pipeline print nothing, and raise the errors of its tasks as they were there.

    Args:
        dataset: the pipeline.
        ordered: whether its results come in the order of its inputs.
    """
    context = dataset.context
    context.execution_options.preserve_order = ordered
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # So that a UserError of an encoding task (a processor that cannot be loaded) arrives as a UserError.
    context.raise_original_map_exception = True
    # If a command reads in its own process, Ray Data's lines would be mixed with the command's output. The error of a
    # task, which it logs with a traceback, is raised too.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def one_block(rows: pa.StructArray) -> pa.Table:
    """Make a block that no operator merges with others or splits: one row, a list of these rows. Copies nothing."""
    return pa.table({_ROWS: pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)})


def rows_of_blocks(blocks: pa.Table) -> Iterator[pa.StructArray]:
    """Yield the rows of each block that `one_block` made."""
    for block in blocks[_ROWS]:
        yield block.values


def encoder_batches(task_batch: pa.Table) -> Iterator[list[dict[str, Any]]]:
    """Yield a task batch's rows of `reading.SCHEMA`, as many at a time as should become one block of encoded pairs.

    Such a block waits whole in the object store and in a worker's memory.
    """
    batch: list[dict[str, Any]] = []
    size = 0
    for row in (row for rows in rows_of_blocks(task_batch) for row in rows.to_pylist()):
        batch.append(row)
        size += stored_bytes(row)
        if len(batch) >= ROWS_PER_BLOCK or size >= BYTES_PER_BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
            item = replace(item, language=row["language"], domain=row["domain"])
        out.append(item)
    return out


@lru_cache(maxsize=2)
def encoder_of_this_process(spec: EncoderSpec) -> PairEncoder:
    """Return the encoder of a spec, made once in a process. From then on, the process is an encoder's."""
    prepare_process()
    return spec.build()


@cache
def prepare_process() -> None:
    """Lower this process's priority, and let its allocators keep freed memory; once."""
    os.nice(ENCODE_NICENESS)
    Image.core.set_blocks_max(_PILLOW_BLOCKS)  # type: ignore[attr-defined]
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, KEEP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)


class _WindowSource(Datasource):
    """A data source that reads a window only when it is needed."""

    def __init__(self, read: ReadSpec, tasks: list[list[tuple[int, int]]]) -> None:
        super().__init__()
        self._tasks = tasks
        self._read = ray.put(read)  # sent once and not with each task: it lists every shard

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(partial(_read_task_batches, self._read, windows), metadata) for windows in self._tasks]


def _read_task_batches(read: ray.ObjectRef, windows: list[tuple[int, int]]) -> Iterator[pa.Table]:
    for rows in read_windows(ray.get(read), windows):
        yield one_block(rows.to_struct_array().combine_chunks())
