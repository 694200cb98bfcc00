"""Read windows of the order as tables of `PreferencePair`s. Reading tasks call this; it needs no Ray.

Every source is read into one schema (`SCHEMA`), one row for each pair, so that one stream can mix sources of any kind.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, pairwise
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from orpo_ray.config.field_types import OtherImage, PairsFromRanking
from orpo_ray.data.bad_rows import BAD_ROW_TYPE, NO_SAMPLE, BadRow
from orpo_ray.data.formats import get_row_id, to_pair
from orpo_ray.data.groups import Grouping
from orpo_ray.data.json_rows import Row
from orpo_ray.data.order import Order
from orpo_ray.data.other_images import FROM_THE_WINDOW, WindowPairs, exchange_images, with_other_images
from orpo_ray.data.pairs import Message, OtherImages, PreferencePair
from orpo_ray.data.ranking import RANKING_TYPE
from orpo_ray.data.related_rows import grouped
from orpo_ray.data.shards import Shard, ShardReader
from orpo_ray.data.videos import with_frames
from orpo_ray.errors import RowError
from orpo_ray.storage.files import image_folder

T = TypeVar("T")
# Size of a task batch, which one encoding task takes. A pair with a large photograph costs about 150 ms and 10 MB of
# pixels, one with a thumbnail 1 ms, and between two tasks a process idles for 100 ms or more.
ROWS_PER_TASK_BATCH = 128
BYTES_PER_TASK_BATCH = 4 << 20
BYTES_OF_A_PATH = 128 << 10  # a guess at the file behind a path
_SHARDS_PER_TASK = 20  # shards that a reading task covers, so that one shard read twice adds 5 %

IMAGES_TYPE = pa.list_(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))
_CONTENT_TYPE = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))
MESSAGES_TYPE = pa.list_(pa.struct([("role", pa.string()), ("content", _CONTENT_TYPE)]))
_OTHER_TYPE = pa.struct(
    [("images", IMAGES_TYPE), ("image_root", pa.string()), ("change", pa.string()), ("seed", pa.int64())]
)
SCHEMA = pa.schema(
    [
        ("sample_index", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("image_root", pa.string()),
        ("images", IMAGES_TYPE),
        ("rejected_images", IMAGES_TYPE),  # null where both answers are to the same images
        ("other", _OTHER_TYPE),  # an `OtherImages`, or null
        ("prompt", MESSAGES_TYPE),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("language", pa.string()),
        ("domain", pa.string()),
        ("ranking", RANKING_TYPE),  # a `Ranking`, or null for a row that is one pair
        ("bad", BAD_ROW_TYPE),  # null for a pair
    ]
)


@dataclass(frozen=True)
class ReadSpec:
    """Rows that a run reads for all its workers, and how to read them."""

    shards: tuple[Shard, ...]
    """All shards of all sources."""
    format_names: tuple[str, ...]
    """The format of each shard."""
    order: Order
    pairs_per_step: int
    first_sample: int
    end_sample: int
    """Samples first_sample to end_sample - 1 are read."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """`data.columns` of the recipe."""
    row_indices: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Rows to read of shards that are not read whole (`data/split.py`). The order counts only these rows."""
    image_root: str | None = None
    """`data.image_root` of the recipe."""
    max_frames: int = 8
    """`data.max_frames` of the recipe."""
    exchange_images: bool = False
    """Whether each pair gets the images of another pair of its window, and is contrasted with none, to measure how much
    images matter."""
    other_image: OtherImage | None = None
    """Which images each pair's chosen answer is contrasted with; None without an image preference."""
    grouping: Grouping = field(default_factory=Grouping)
    """What names the language and the domain of each row."""
    group: bool = False
    """Whether rows that share an image or a prompt follow each other within their window (`data.group`)."""
    pairs_from_ranking: PairsFromRanking = "best_worst"
    """Which pairs a row with several rated answers gives."""
    pipeline: str = ""
    """Id of the pipeline that reads the rows; empty for a new one. See `of_run`."""

    @property
    def digest(self) -> str:
        """Hash of the data files' names and sizes: equal for the same files in another folder."""
        facts = [(PurePosixPath(each.path).name, each.num_rows, each.num_bytes) for each in self.shards]
        kept = [hashlib.sha256(rows.tobytes()).hexdigest() for rows in self.row_indices.values()]
        return hashlib.sha256(json.dumps([facts, kept, self.order.weights]).encode()).hexdigest()[:16]

    def of_run(self, run_uri: str) -> ReadSpec:
        """Return the spec for the training rows of a run: every start of the run has a pipeline of the same id."""
        return replace(self, pipeline=pipeline_of(run_uri))

    def root_of(self, shard: Shard) -> str | None:
        """Return the folder that a shard's image paths are relative to."""
        return self.image_root or shard.image_root


def pipeline_of(run_uri: str) -> str:
    """Return the id of the pipeline that reads the training rows of a run."""
    return hashlib.sha256(run_uri.encode()).hexdigest()[:16]


def read_tasks(spec: ReadSpec) -> list[list[tuple[int, int]]]:
    """Divide the windows, as (epoch, window), into reading tasks of consecutive windows.

    Where two tasks meet within a shard, both read it. A task has so many windows that this adds a few per cent.
    """
    windows = spec.order.windows(spec.first_sample, spec.end_sample)
    sizes = spec.order.stored_rows
    # The mean size of the shard that a random row lies in: large shards are cut more often.
    cut = (sizes**2).sum() / max(1, sizes.sum())
    count = max(1, math.ceil(_SHARDS_PER_TASK * cut / spec.order.window_rows))
    return [windows[first : first + count] for first in range(0, len(windows), count)]


def read_windows(spec: ReadSpec, windows: Sequence[tuple[int, int]]) -> Iterator[pa.Table]:
    """Yield the rows of consecutive windows as task batches: tables of `SCHEMA`, in order of sample indices.

    Reads each shard once, and keeps one shard and the rows of one window in memory.
    """
    reader = ShardReader()
    ahead = chain((spec.order.window(*window) for window in windows), [None])
    for (epoch, _), (window, following) in zip(windows, pairwise(ahead), strict=True):
        assert window is not None
        sample_indices = window.first_sample + np.arange(len(window.rows))
        wanted = (sample_indices >= spec.first_sample) & (sample_indices < spec.end_sample)
        # New images, and what a row is grouped with, may come from any row of the window, also in a resumed run.
        needs_all = spec.exchange_images or spec.group or spec.other_image in FROM_THE_WINDOW
        read = np.ones_like(wanted) if needs_all else wanted
        next_shards = [] if following is None else np.unique(following.rows[:, 0]).tolist()
        shared = set(map(spec.order.stored_shard, next_shards))
        pairs = _read_window(spec, sample_indices[read], window.rows[read], reader, shared)
        if not any(reader.holds(spec.shards[shard]) for shard in next_shards):
            reader.release()
        if spec.other_image is not None:
            pairs = with_other_images(pairs, spec.other_image, spec.root_of, spec.order.seed, epoch)
        if spec.exchange_images:
            pairs = exchange_images(pairs, spec.root_of)
        if spec.group:
            pairs = grouped(pairs, spec.root_of)
        yield from _tables(spec, [(int(sample_index), *pairs[sample_index]) for sample_index in sample_indices[wanted]])


def read_pairs(
    spec: ReadSpec, shard: int, rows: np.ndarray, reader: ShardReader | None = None
) -> list[PreferencePair | BadRow]:
    """Read rows of a shard. A row that cannot be a pair comes as a `BadRow` without a sample index."""
    format_name = spec.format_names[shard]
    folder_of_images = image_folder(spec.root_of(spec.shards[shard]))

    def convert(raw: Row, where: str) -> PreferencePair:
        pair = to_pair(raw, format_name, spec.columns, where, spec.pairs_from_ranking)
        pair = with_frames(pair, spec.max_frames, folder_of_images)
        language = spec.grouping.language_of(raw, pair.prompt, pair.chosen)
        return replace(pair, source=where, language=language, domain=spec.grouping.domain_of(raw))

    return convert_rows(spec.shards[shard], rows, convert, spec.columns, reader or ShardReader())


def convert_rows(
    shard: Shard,
    rows: np.ndarray,
    convert: Callable[[Row, str], T],
    columns: Mapping[str, str],
    reader: ShardReader,
) -> list[T | BadRow]:
    """Read rows of a shard, and convert each.

    Args:
        shard: the shard.
        rows: indices in the shard.
        convert: takes a raw row, and the file and position of it. Raises RowError if the row cannot be used.
        columns: columns to rename, for the id of a bad row.
        reader: keeps the shard for the next call.

    Returns:
        What `convert` made of each row, or a `BadRow` without a sample index.
    """
    found: list[T | BadRow] = []
    take = reader.open(shard)
    for row, raw in zip(rows.tolist(), take(rows.tolist()), strict=True):
        where = shard.describe(row)
        try:
            if isinstance(raw, RowError):
                raise raw
            found.append(convert(raw, where))
        except RowError as error:
            row_id = where if isinstance(raw, RowError) else get_row_id(raw, columns, where)
            found.append(BadRow.of(error, NO_SAMPLE, _writable(row_id), where))
    return found


def _writable(text: str) -> str:
    """Replace lone surrogates, which cannot be written to a file."""
    return text.encode(errors="replace").decode()


def pair_at(spec: ReadSpec, sample_index: int) -> tuple[Shard, PreferencePair | BadRow]:
    """Read the pair of one sample index, without other images."""
    ((epoch, number),) = spec.order.windows(sample_index, sample_index + 1)
    window = spec.order.window(epoch, number)
    sample_indices = window.first_sample + np.arange(len(window.rows))
    read = np.ones(len(window.rows), bool) if spec.group else sample_indices == sample_index
    pairs = _read_window(spec, sample_indices[read], window.rows[read], ShardReader(), set())
    return (grouped(pairs, spec.root_of) if spec.group else pairs)[sample_index]


def _read_window(
    spec: ReadSpec, sample_indices: np.ndarray, rows: np.ndarray, reader: ShardReader, shared: set[int]
) -> WindowPairs:
    """Return the shard and the pair, or bad row, of each sample index. Reads each shard once.

    Args:
        spec: which rows, and how to read them.
        sample_indices: of the rows.
        rows: (shard, row in the shard) of each.
        reader: may still hold a shard of the window before.
        shared: stored shards that the window after this one needs too, and which are therefore read last.
    """
    shards = np.unique(rows[:, 0]).tolist()
    found: dict[int, list[PreferencePair | BadRow]] = {}

    def when(shard: int) -> tuple[bool, bool, int]:
        stored = spec.order.stored_shard(shard)  # whose parts are read one after another
        return stored in shared, not reader.holds(spec.shards[shard]), stored

    for index in sorted(shards, key=when):
        wanted = rows[rows[:, 0] == index, 1]
        if index in spec.row_indices:
            wanted = spec.row_indices[index][wanted]
        found[index] = read_pairs(spec, index, wanted, reader)
    pairs: WindowPairs = {}
    for index in shards:
        for sample_index, pair in zip(sample_indices[rows[:, 0] == index].tolist(), found[index], strict=True):
            placed = replace(pair, sample_index=sample_index) if isinstance(pair, BadRow) else pair
            pairs[sample_index] = (spec.shards[index], placed)
    return pairs


def _tables(spec: ReadSpec, rows: list[tuple[int, Shard, PreferencePair | BadRow]]) -> Iterator[pa.Table]:
    """Yield task batches of rows."""
    batch: list[dict[str, object]] = []
    size = 0
    for sample_index, shard, pair in rows:
        base: dict[str, object] = {"sample_index": sample_index, "image_root": spec.root_of(shard)}
        if isinstance(pair, PreferencePair):
            named = (
                "id", "source", "images", "rejected_images", "prompt", "chosen", "rejected", "language", "domain",
            )  # fmt: skip
            structs = {"other": pair.other, "ranking": pair.ranking}
            values = {name: None if value is None else vars(value) for name, value in structs.items()}
            batch.append(base | {name: getattr(pair, name) for name in named} | values)
            size += stored_bytes(batch[-1])
        else:
            batch.append(base | {"id": pair.id, "source": pair.source, "bad": asdict(pair)})
        if len(batch) >= ROWS_PER_TASK_BATCH or size >= BYTES_PER_TASK_BATCH:
            yield pa.Table.from_pylist(batch, schema=SCHEMA)
            batch, size = [], 0
    if batch:
        yield pa.Table.from_pylist(batch, schema=SCHEMA)


def stored_bytes(row: Mapping[str, Any]) -> int:
    """Estimate the bytes of the images and texts of a row of `SCHEMA`."""
    other = row.get("other") or {}
    images = [*(row.get("images") or ()), *(row.get("rejected_images") or ()), *(other.get("images") or ())]
    size = sum(len(image["bytes"]) if image["bytes"] else BYTES_OF_A_PATH for image in images)
    if row.get("bad") is None:
        size += sum(map(len, (row["ranking"] or {}).get("answers") or (row["chosen"], row["rejected"])))
        size += sum(len(part.get("text") or "") for message in row["prompt"] for part in message["content"])
    return size


def pair_of(row: Mapping[str, Any]) -> PreferencePair | BadRow:
    """Rebuild a pair, or a bad row, from a row of `SCHEMA` without a ranking (`ranking.split_ranking`)."""
    if row["bad"] is not None:
        return BadRow(**row["bad"])
    return PreferencePair(
        id=row["id"],
        images=row["images"] or [],
        prompt=messages_of(row["prompt"]),
        chosen=row["chosen"],
        rejected=row["rejected"],
        source=row["source"],
        rejected_images=row["rejected_images"],
        other=None if row["other"] is None else OtherImages(**row["other"]),
        language=row["language"],
        domain=row["domain"],
    )


def messages_of(column: list[Message]) -> list[Message]:
    """Rebuild messages from a value of `MESSAGES_TYPE`, in which an image has a text, which is null."""
    return [
        {
            "role": message["role"],
            "content": [
                {key: value for key, value in part.items() if value is not None} for part in message["content"]
            ],
        }
        for message in column
    ]
