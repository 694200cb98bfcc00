"""Read and encode every row of a dataset with Ray Data: facts for `data check`, usable rows for `data prepare`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow as pa

from orpo_ray.data.bad_rows import BAD_ROW_TYPE, BadRow
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.groups import Grouping
from orpo_ray.data.images import load_image, read_image_bytes
from orpo_ray.data.other_images import image_fingerprint
from orpo_ray.data.pairs import Image, PreferencePair
from orpo_ray.data.reading import IMAGES_TYPE, MESSAGES_TYPE, ReadSpec, pair_of
from orpo_ray.data_report.facts import PairFacts, facts_from_json, facts_of
from orpo_ray.storage.files import image_folder
from orpo_ray.streaming.pipeline import (
    encode_rows,
    encoder_batches,
    encoder_of_this_process,
    iter_blocks,
    one_block,
    rows_of_blocks,
)

# Columns of prepared data: TRL's conversational vision format, with the original image bytes.
_CLEAN_COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("images", IMAGES_TYPE),
        ("rejected_images", IMAGES_TYPE),
        ("prompt", MESSAGES_TYPE),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
    ]
)


def clean_schema(grouping: Grouping) -> pa.Schema:
    """Return the schema of prepared data. The columns of language and domain keep their names."""
    schema = _CLEAN_COLUMNS
    for column in group_columns(grouping):
        if column not in schema.names:
            schema = schema.append(pa.field(column, pa.string()))
    return schema


def group_columns(grouping: Grouping) -> dict[str, str]:
    """Return the columns that name language and domain, each with its kind; not those that hold the pair itself."""
    columns = {name: kind for kind, name in grouping.columns.items()}
    return {name: kind for name, kind in columns.items() if name == "source" or name not in _CLEAN_COLUMNS.names}


def iter_checked(read: ReadSpec, encoder: EncoderSpec, max_encoders: int) -> Iterator[PairFacts | BadRow]:
    """Yield facts about each row for `orpo-ray data check`, in no particular order.

    Args:
        read: the rows.
        encoder: how to encode them.
        max_encoders: maximum number of encoding processes.
    """
    for blocks in iter_blocks(read, partial(_check, encoder=encoder), max_encoders, ordered=False):
        for block in blocks.to_pylist():
            yield from map(facts_from_json, json.loads(block["facts"]))
            yield from (BadRow(**bad) for bad in block["bad"])


def iter_clean(read: ReadSpec, encoder: EncoderSpec, max_encoders: int) -> Iterator[tuple[pa.Table, list[BadRow]]]:
    """Yield tables of the usable pairs (`clean_schema`), with image bytes, and the bad rows between them, in order.

    Args:
        read: the rows.
        encoder: how to encode them.
        max_encoders: maximum number of encoding processes.
    """
    work = partial(_clean, encoder=encoder, grouping=read.grouping)
    for blocks in iter_blocks(read, work, max_encoders, ordered=True):
        for rows, bad in zip(rows_of_blocks(blocks), blocks["bad"].to_pylist(), strict=True):
            yield pa.Table.from_struct_array(rows), [BadRow(**each) for each in bad]


def _check(task_batch: pa.Table, encoder: EncoderSpec) -> Iterator[pa.Table]:
    """Encode a task batch; yield the `PairFacts` of its pairs as JSON, and its bad rows."""
    for rows in encoder_batches(task_batch):
        facts, bad = [], []
        encoding = encoder_of_this_process(encoder)
        for row, item in zip(rows, encode_rows(rows, encoding), strict=True):
            if isinstance(item, BadRow):
                bad.append(item)
                continue
            pair = pair_of(row)
            assert isinstance(pair, PreferencePair)
            images, root = [*pair.images, *(pair.rejected_images or ())], image_folder(row["image_root"])
            fingerprints = [image_fingerprint(image, row["image_root"]) for image in images]
            sizes = [load_image(image, root, encoder.allow_http).size for image in images]
            encoded = replace(item, sample_index=row["sample_index"])
            facts.append(facts_of(pair, encoded, fingerprints, sizes, encoding.closing_tokens))
        table = pa.table({"facts": [json.dumps([asdict(each) for each in facts])]})
        yield table.append_column("bad", _bad_column(bad))


def _clean(task_batch: pa.Table, encoder: EncoderSpec, grouping: Grouping) -> Iterator[pa.Table]:
    """Encode a task batch; yield its usable pairs, and its bad rows."""
    for rows in encoder_batches(task_batch):
        encoded = encode_rows(rows, encoder_of_this_process(encoder))
        columns = group_columns(grouping)
        bad = [item for item in encoded if isinstance(item, BadRow)]
        good = [
            _clean_row(row, encoder.allow_http) | {name: row[kind] for name, kind in columns.items()}
            for row, item in zip(rows, encoded, strict=True)
            if not isinstance(item, BadRow)
        ]
        block = one_block(pa.array(good, pa.struct(list(clean_schema(grouping)))))
        yield block.append_column("bad", _bad_column(bad))


def _bad_column(bad: list[BadRow]) -> pa.Array:
    """Put all bad rows of a block into one cell."""
    return pa.array([[asdict(row) for row in bad]], pa.list_(BAD_ROW_TYPE))


def _clean_row(row: dict[str, Any], allow_http: bool) -> dict[str, Any]:
    root = image_folder(row["image_root"])

    def with_bytes(images: list[Image] | None) -> list[Image] | None:
        if images is None:
            return None
        return [{"bytes": read_image_bytes(image, root, allow_http), "path": None} for image in images]

    texts = {name: row[name] for name in ("id", "source", "prompt", "chosen", "rejected")}
    images = {name: with_bytes(row[name]) for name in ("images", "rejected_images")}
    return texts | images
