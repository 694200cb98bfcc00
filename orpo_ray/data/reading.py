"""Windows of the order -> tables of `PreferencePair`s. What a read task does; plain functions without ray.

Every source comes out in one schema (`SCHEMA`), a row a pair, so that sources of any kind can stand in one stream.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from orpo_ray.data.formats import PreferencePair, to_pair
from orpo_ray.data.order import Order, owner
from orpo_ray.data.sources import Segment, read_segment, table_rows
from orpo_ray.errors import BadRow

# What one encoding task takes: a pair with a large photograph costs it some 50 ms and 13 MB of pixels, one with a
# thumbnail 1 ms, and a task itself about 5 ms.
ROWS_PER_CHUNK = 32
BYTES_PER_CHUNK = 512 << 10
BYTES_OF_A_PATH = 128 << 10  # a guess at the file behind a path

SCHEMA = pa.schema(
    [
        ("slot", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("image_root", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))),
        ("prompt", pa.string()),  # the messages, as JSON
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("bad", pa.string()),  # for a row that cannot be a pair: [reason, detail], as JSON
    ]
)


@dataclass(frozen=True)
class ReadSpec:
    """Which rows one worker reads, and how.

    Slots [first_slot, last_slot) that `rank` of `num_workers` owns. format_names: the format of each segment.
    exchange_images: give each pair the images of another pair of its window, to see whether they matter.
    """

    segments: tuple[Segment, ...]
    format_names: tuple[str, ...]
    order: Order
    pairs_per_step: int
    first_slot: int
    last_slot: int
    rank: int = 0
    num_workers: int = 1
    columns: Mapping[str, str] = field(default_factory=dict)
    image_root: Path | None = None
    exchange_images: bool = False

    def owned(self, slots: np.ndarray) -> np.ndarray:
        """Which of these slots this worker trains on: bool, same shape."""
        mine = owner(slots, self.pairs_per_step, self.num_workers) == self.rank
        return mine & (slots >= self.first_slot) & (slots < self.last_slot)


def read_window(spec: ReadSpec, epoch: int, number: int) -> Iterator[pa.Table]:
    """Tables of `SCHEMA` with this worker's rows of one window, in the order of their slots."""
    window = spec.order.window(epoch, number)
    slots = window.first_slot + np.arange(len(window.rows))
    owned = spec.owned(slots)
    # A pair's new images may come from any row of the window, whoever owns it: that keeps them the same for any
    # number of workers.
    wanted = np.ones_like(owned) if spec.exchange_images else owned
    pairs = _read_pairs(spec, slots[wanted], window.rows[wanted])
    if spec.exchange_images:
        pairs = _exchange(pairs)
    yield from _tables(spec, [(int(slot), *pairs[slot]) for slot in slots[owned]])


def _read_pairs(
    spec: ReadSpec, slots: np.ndarray, rows: np.ndarray
) -> dict[int, tuple[Segment, PreferencePair | tuple[str, BadRow]]]:
    """slot -> (segment, pair), or (segment, (where it stands, what is wrong)). Each segment is read once."""
    pairs: dict[int, tuple[Segment, PreferencePair | tuple[str, BadRow]]] = {}
    for index in np.unique(rows[:, 0]):
        segment, format_name = spec.segments[index], spec.format_names[index]
        here = rows[:, 0] == index
        table = read_segment(segment, rows[here, 1].tolist())
        raw_rows = table_rows(table, segment.kind)
        for slot, row, raw in zip(slots[here], rows[here, 1], raw_rows, strict=True):
            where = segment.describe(int(row))
            try:
                if isinstance(raw, BadRow):
                    raise raw
                pair = to_pair(raw, format_name, spec.columns, fallback_id=where)
                pairs[slot] = (segment, replace(pair, source=where))
            except BadRow as bad:
                pairs[slot] = (segment, (where, bad))
    return pairs


def _exchange(
    pairs: dict[int, tuple[Segment, PreferencePair | tuple[str, BadRow]]],
) -> dict[int, tuple[Segment, PreferencePair | tuple[str, BadRow]]]:
    """Give every pair the images of the next pair with as many, but other, images; a BadRow where there is none."""
    groups: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for slot, (segment, pair) in pairs.items():
        if isinstance(pair, PreferencePair) and pair.images:
            groups[len(pair.images)].append((slot, _fingerprint(segment, pair)))
    out = dict(pairs)
    for slot, (segment, pair) in pairs.items():
        if isinstance(pair, PreferencePair) and not pair.images:
            out[slot] = (segment, (pair.source, BadRow("no_image_to_exchange", "the pair has no image")))
    for group in groups.values():
        for place, (slot, fingerprint) in enumerate(group):
            segment, pair = pairs[slot]
            assert isinstance(pair, PreferencePair)
            followers = (group[(place + step) % len(group)] for step in range(1, len(group)))
            other = next((there for there, theirs in followers if theirs != fingerprint), None)
            if other is None:
                out[slot] = (segment, (pair.source, BadRow("no_image_to_exchange", "no other images to exchange with")))
                continue
            other_segment, other_pair = pairs[other]
            assert isinstance(other_pair, PreferencePair)
            out[slot] = (other_segment, replace(pair, images=other_pair.images))
    return out


def _fingerprint(segment: Segment, pair: PreferencePair) -> str:
    """The same for the same images: their bytes, or their paths and what those are relative to."""
    digest = hashlib.sha256(str(segment.image_root).encode() if pair.images[0]["path"] else b"")
    for image in pair.images:
        digest.update(image["bytes"] if image["bytes"] is not None else image["path"].encode())
    return digest.hexdigest()


def _tables(spec: ReadSpec, rows: list[tuple[int, Segment, PreferencePair | tuple[str, BadRow]]]) -> Iterator[pa.Table]:
    block: list[dict[str, object]] = []
    size = 0
    for slot, segment, pair in rows:
        root = spec.image_root or segment.image_root
        base: dict[str, object] = {"slot": slot, "image_root": str(root) if root else None}
        if isinstance(pair, PreferencePair):
            block.append(
                base
                | {"id": pair.id, "source": pair.source, "images": pair.images, "prompt": json.dumps(pair.prompt)}
                | {"chosen": pair.chosen, "rejected": pair.rejected}
            )
            size += sum(len(image["bytes"]) if image["bytes"] else BYTES_OF_A_PATH for image in pair.images)
        else:
            where, bad = pair
            block.append(base | {"id": where, "source": where, "bad": json.dumps([bad.reason, bad.detail])})
        if len(block) >= ROWS_PER_CHUNK or size >= BYTES_PER_CHUNK:
            yield pa.Table.from_pylist(block, schema=SCHEMA)
            block, size = [], 0
    if block:
        yield pa.Table.from_pylist(block, schema=SCHEMA)


def pair_of(row: Mapping[str, object]) -> PreferencePair | BadRow:
    """A row of `SCHEMA` back as a pair, or as what was wrong with it."""
    if row["bad"] is not None:
        return BadRow(*json.loads(str(row["bad"])))
    return PreferencePair(
        id=str(row["id"]),
        images=list(row["images"] or []),  # type: ignore[call-overload]
        prompt=json.loads(str(row["prompt"])),
        chosen=str(row["chosen"]),
        rejected=str(row["rejected"]),
        source=str(row["source"]),
    )
