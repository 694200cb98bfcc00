"""Windows of the order -> tables of `PreferencePair`s. What a read task does; plain functions without ray.

Every source comes out in one schema (`SCHEMA`), a row a pair, so that sources of any kind can stand in one stream.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from orpo_ray.data.containers import Segment, read_rows
from orpo_ray.data.formats import id_of, to_pair
from orpo_ray.data.order import Order, owner
from orpo_ray.data.pairs import Image, PreferencePair
from orpo_ray.errors import BadRow

# What one encoding task takes: a pair with a large photograph costs it some 150 ms and 10 MB of pixels, one with a
# thumbnail 1 ms, and between two tasks a process idles for 100 ms or more.
ROWS_PER_CHUNK = 128
BYTES_PER_CHUNK = 4 << 20
BYTES_OF_A_PATH = 128 << 10  # a guess at the file behind a path

_IMAGES = pa.list_(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))
SCHEMA = pa.schema(
    [
        ("slot", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("image_root", pa.string()),
        ("images", _IMAGES),
        ("rejected_images", _IMAGES),  # null where both answers are to the same images
        ("prompt", pa.string()),  # the messages, as JSON
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("bad", pa.string()),  # for a row that cannot be a pair: [reason, detail], as JSON
    ]
)


@dataclass(frozen=True)
class ReadSpec:
    """Which rows one worker reads, and how.

    Slots [first_slot, last_slot) that `rank` of `num_workers` owns. format_names: the format of each segment. kept: of
    segments that are read in part (`data/split.py`), the rows; the order counts only those.
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
    kept: Mapping[int, np.ndarray] = field(default_factory=dict)
    image_root: str | None = None
    exchange_images: bool = False

    @property
    def digest(self) -> str:
        """The same for the same files of rows, wherever they lie."""
        facts = [(PurePosixPath(each.path).name, each.num_rows, each.num_bytes) for each in self.segments]
        kept = [hashlib.sha256(rows.tobytes()).hexdigest() for rows in self.kept.values()]
        return hashlib.sha256(json.dumps([facts, kept, self.order.weights]).encode()).hexdigest()[:16]

    def root_of(self, segment: Segment) -> str | None:
        """What image paths of a segment's rows are relative to."""
        return self.image_root or segment.image_root

    def owned(self, slots: np.ndarray) -> np.ndarray:
        """Which of these slots this worker trains on: bool, same shape."""
        mine = owner(slots, self.pairs_per_step, self.num_workers) == self.rank
        return mine & (slots >= self.first_slot) & (slots < self.last_slot)


@dataclass(frozen=True)
class Refused:
    """A row that cannot be a pair. source: where it stands."""

    id: str
    source: str
    bad: BadRow


def read_window(spec: ReadSpec, epoch: int, number: int) -> Iterator[pa.Table]:
    """Tables of `SCHEMA` with this worker's rows of one window, in the order of their slots."""
    window = spec.order.window(epoch, number)
    slots = window.first_slot + np.arange(len(window.rows))
    owned = spec.owned(slots)
    # A pair's new images may come from any row of the window, whoever owns it: that keeps them the same for any
    # number of workers.
    wanted = np.ones_like(owned) if spec.exchange_images else owned
    pairs = _read_window(spec, slots[wanted], window.rows[wanted])
    if spec.exchange_images:
        pairs = _exchange(spec, pairs)
    yield from _tables(spec, [(int(slot), *pairs[slot]) for slot in slots[owned]])


def read_pairs(spec: ReadSpec, segment: int, rows: np.ndarray) -> list[PreferencePair | Refused]:
    """Rows of a segment as pairs, or as what is wrong with them."""
    there, format_name = spec.segments[segment], spec.format_names[segment]
    pairs: list[PreferencePair | Refused] = []
    for row, raw in zip(rows.tolist(), read_rows(there, rows.tolist()), strict=True):
        where = there.describe(row)
        try:
            if isinstance(raw, BadRow):
                raise raw
            pairs.append(replace(to_pair(raw, format_name, spec.columns, fallback_id=where), source=where))
        except BadRow as bad:
            row_id = where if isinstance(raw, BadRow) else id_of(raw, spec.columns, where)
            pairs.append(Refused(_writable(row_id), where, bad))
    return pairs


def _writable(text: str) -> str:
    """Without halves of characters, which no file takes."""
    return text.encode(errors="replace").decode()


def pair_at(spec: ReadSpec, slot: int) -> tuple[Segment, PreferencePair | Refused]:
    """The pair of one slot, whoever owns it."""
    ((epoch, number),) = spec.order.windows(slot, slot + 1)
    window = spec.order.window(epoch, number)
    place = slot - window.first_slot
    return _read_window(spec, np.array([slot]), window.rows[place : place + 1])[slot]


def image_fingerprint(image: Image, root: str | None) -> str:
    """The same for the same image: its bytes, or its path and what that is relative to."""
    digest = hashlib.sha256()
    if image["bytes"] is not None:
        digest.update(image["bytes"])
    else:
        digest.update(f"{root}/{image['path']}".encode())
    return digest.hexdigest()


def _read_window(
    spec: ReadSpec, slots: np.ndarray, rows: np.ndarray
) -> dict[int, tuple[Segment, PreferencePair | Refused]]:
    """slot -> (segment, pair or what is wrong). Each segment is read once."""
    pairs: dict[int, tuple[Segment, PreferencePair | Refused]] = {}
    for index in np.unique(rows[:, 0]).tolist():
        here = rows[:, 0] == index
        wanted = rows[here, 1]
        if index in spec.kept:
            wanted = spec.kept[index][wanted]
        for slot, pair in zip(slots[here].tolist(), read_pairs(spec, index, wanted), strict=True):
            pairs[slot] = (spec.segments[index], pair)
    return pairs


def _exchange(
    spec: ReadSpec,
    pairs: dict[int, tuple[Segment, PreferencePair | Refused]],
) -> dict[int, tuple[Segment, PreferencePair | Refused]]:
    """Give every pair the images of the next pair with as many, but other, images; a BadRow where there is none."""
    groups: dict[tuple[int, int], list[tuple[int, str]]] = defaultdict(list)
    for slot, (segment, pair) in pairs.items():
        if isinstance(pair, PreferencePair) and pair.images:
            groups[len(pair.images), len(pair.rejected_images or ())].append(
                (slot, _fingerprint(pair, spec.root_of(segment)))
            )
    out = dict(pairs)
    for slot, (segment, pair) in pairs.items():
        if isinstance(pair, PreferencePair) and not pair.images:
            out[slot] = (
                segment,
                Refused(pair.id, pair.source, BadRow("no_image_to_exchange", "the pair has no image")),
            )
    for group in groups.values():
        for place, (slot, fingerprint) in enumerate(group):
            segment, pair = pairs[slot]
            assert isinstance(pair, PreferencePair)
            followers = (group[(place + step) % len(group)] for step in range(1, len(group)))
            other = next((there for there, theirs in followers if theirs != fingerprint), None)
            if other is None:
                nothing = BadRow("no_image_to_exchange", "no other images to exchange with")
                out[slot] = (segment, Refused(pair.id, pair.source, nothing))
                continue
            other_segment, other_pair = pairs[other]
            assert isinstance(other_pair, PreferencePair)
            swapped = replace(pair, images=other_pair.images, rejected_images=other_pair.rejected_images)
            out[slot] = (other_segment, swapped)
    return out


def _fingerprint(pair: PreferencePair, root: str | None) -> str:
    """The same for the same images in the same order."""
    return " ".join(image_fingerprint(image, root) for image in pair.images)


def _tables(spec: ReadSpec, rows: list[tuple[int, Segment, PreferencePair | Refused]]) -> Iterator[pa.Table]:
    block: list[dict[str, object]] = []
    size = 0
    for slot, segment, pair in rows:
        base: dict[str, object] = {"slot": slot, "image_root": spec.root_of(segment)}
        if isinstance(pair, PreferencePair):
            named = ("id", "source", "images", "rejected_images", "chosen", "rejected")
            block.append(base | {name: getattr(pair, name) for name in named} | {"prompt": json.dumps(pair.prompt)})
            size += stored_bytes(block[-1])
        else:
            bad = json.dumps([pair.bad.reason, pair.bad.detail])
            block.append(base | {"id": pair.id, "source": pair.source, "bad": bad})
        if len(block) >= ROWS_PER_CHUNK or size >= BYTES_PER_CHUNK:
            yield pa.Table.from_pylist(block, schema=SCHEMA)
            block, size = [], 0
    if block:
        yield pa.Table.from_pylist(block, schema=SCHEMA)


def stored_bytes(row: Mapping[str, Any]) -> int:
    """About what the images of a row of `SCHEMA` weigh."""
    images = [*(row.get("images") or ()), *(row.get("rejected_images") or ())]
    return sum(len(image["bytes"]) if image["bytes"] else BYTES_OF_A_PATH for image in images)


def pair_of(row: Mapping[str, Any]) -> PreferencePair | BadRow:
    """A row of `SCHEMA` back as a pair, or as what was wrong with it."""
    if row["bad"] is not None:
        return BadRow(*json.loads(row["bad"]))
    return PreferencePair(
        id=row["id"],
        images=row["images"] or [],
        prompt=json.loads(row["prompt"]),
        chosen=row["chosen"],
        rejected=row["rejected"],
        source=row["source"],
        rejected_images=row["rejected_images"],
    )
