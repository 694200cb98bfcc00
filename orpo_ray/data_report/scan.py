"""What the `data` commands ask of every row of a set: facts for a check, clean rows to be written down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow as pa

from orpo_ray.data.bad_rows import BAD_ROW_TYPE, BadRow
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.images import load_image, read_image_bytes
from orpo_ray.data.pairs import Image, PreferencePair
from orpo_ray.data.reading import ReadSpec, image_fingerprint, pair_of
from orpo_ray.data_report.report import PairFacts, facts_from_json, facts_of
from orpo_ray.storage.files import image_folder
from orpo_ray.streaming.pipeline import (
    encode_rows,
    encoder_of_this_process,
    iter_blocks,
    pack_rows,
    portions,
    unpack_rows,
)

_IMAGES = pa.list_(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))
_PARTS = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))
# What is written: TRL's conversational vision format, with images as they were stored.
CLEAN_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("images", _IMAGES),
        ("rejected_images", _IMAGES),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", _PARTS)]))),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
    ]
)


def iter_checked(read: ReadSpec, encoder: EncoderSpec, max_encoders: int) -> Iterator[PairFacts | BadRow]:
    """Yield the facts that `orpo-ray data check` needs about every row, in no particular order."""
    for block in iter_blocks(read, partial(_check_chunk, encoder=encoder), max_encoders, ordered=False):
        for chunk in block.to_pylist():
            yield from map(facts_from_json, json.loads(chunk["facts"]))
            yield from (BadRow(**bad) for bad in chunk["bad"])


def iter_clean(read: ReadSpec, encoder: EncoderSpec, max_encoders: int) -> Iterator[tuple[pa.Table, list[BadRow]]]:
    """Tables of the pairs that can be trained on, with their images' bytes in them, and the rows that cannot."""
    for block in iter_blocks(read, partial(_clean_chunk, encoder=encoder), max_encoders, ordered=True):
        for chunk in block.to_pylist():
            table = pa.ipc.open_stream(pa.py_buffer(chunk["pairs"])).read_all()
            yield table, [BadRow(**bad) for bad in chunk["bad"]]


def _check_chunk(chunk: pa.Table, encoder: EncoderSpec) -> Iterator[pa.Table]:
    """One packed chunk -> its pairs' `PairFacts`, as JSON, and its bad rows."""
    for rows in portions(unpack_rows(chunk)):
        facts, bad = [], []
        for row, item in zip(rows, encode_rows(rows, encoder_of_this_process(encoder)), strict=True):
            if isinstance(item, BadRow):
                bad.append(item)
                continue
            pair = pair_of(row)
            assert isinstance(pair, PreferencePair)
            images, root = [*pair.images, *(pair.rejected_images or ())], image_folder(row["image_root"])
            prints = [image_fingerprint(image, row["image_root"]) for image in images]
            sizes = [load_image(image, root, encoder.allow_http).size for image in images]
            facts.append(facts_of(pair, replace(item, sample_index=row["sample_index"]), prints, sizes))
        table = pa.table({"facts": [json.dumps([asdict(each) for each in facts])]})
        yield table.append_column("bad", _bad_column(bad))


def _clean_chunk(chunk: pa.Table, encoder: EncoderSpec) -> Iterator[pa.Table]:
    """One packed chunk -> the rows of it that can be trained on, in the form that is written down."""
    for rows in portions(unpack_rows(chunk)):
        encoded = encode_rows(rows, encoder_of_this_process(encoder))
        bad = [item for item in encoded if isinstance(item, BadRow)]
        good = [
            _clean_row(row, encoder.allow_http)
            for row, item in zip(rows, encoded, strict=True)
            if not isinstance(item, BadRow)
        ]
        packed = pack_rows(pa.Table.from_pylist(good, schema=CLEAN_SCHEMA))
        yield packed.append_column("bad", _bad_column(bad))


def _bad_column(bad: list[BadRow]) -> pa.Array:
    """All bad rows of a chunk in one cell."""
    return pa.array([[asdict(row) for row in bad]], pa.list_(BAD_ROW_TYPE))


def _clean_row(row: dict[str, Any], allow_http: bool) -> dict[str, Any]:
    root = image_folder(row["image_root"])

    def stored(images: list[Image] | None) -> list[Image] | None:
        if images is None:
            return None
        return [{"bytes": read_image_bytes(image, root, allow_http), "path": None} for image in images]

    kept = {name: row[name] for name in ("id", "source", "chosen", "rejected")}
    images = {name: stored(row[name]) for name in ("images", "rejected_images")}
    return kept | images | {"prompt": json.loads(row["prompt"])}
