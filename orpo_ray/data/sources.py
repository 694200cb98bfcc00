"""Where rows come from: what a recipe's `data.train` names -> the shards of its files.

A source is one URI of the mix: a file, folder or glob, here or in an object store, a dataset of the Hugging Face hub,
or a split of easy-vqa.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qsl

import pyarrow.parquet as pq

from orpo_ray.data.containers import EASY_VQA, Row, Shard, easy_vqa_shard, file_shards, is_readable, read_rows
from orpo_ray.errors import UserError
from orpo_ray.storage.files import list_files, locate, parent_folder, read_bytes

HUB = "hf://"
ROWS_TO_KNOW_A_FORMAT = 64
# Files that say something of the rows beside them.
STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"
MANIFEST_FILE = "manifest.json"
_NOT_ROWS = {STATE_FILE, SPLITS_FILE, MANIFEST_FILE, "dataset_info.json", "dataset_infos.json"}
_FIX = "give .parquet, .jsonl, .json, .tar or .arrow files, a folder or glob of them, or easy-vqa:train"


@dataclass(frozen=True)
class Source:
    """One URI of a mix. weight: how often an epoch takes its rows; 0.5 is every second of them."""

    uri: str
    weight: float
    shards: tuple[Shard, ...]


def list_sources(mix: Mapping[str, float], field: str) -> list[Source]:
    """The sources of a mix, listed. `field` names the recipe's key in errors. Raises UserError."""
    sources = [Source(uri, weight, tuple(_shards_of(uri, field))) for uri, weight in mix.items()]
    for source in sources:
        if not any(shard.num_rows for shard in source.shards):
            raise UserError("there are no rows", field=field, value=source.uri)
    return sources


def first_rows(shard: Shard) -> tuple[list[str], list[Row]]:
    """The column names of a shard and its first rows, by which a format is recognised. Raises UserError."""
    if shard.kind == "parquet":
        filesystem, path = locate(shard.path)
        with filesystem.open_input_file(path) as file:
            table = pq.ParquetFile(file)
            batches = table.iter_batches(batch_size=ROWS_TO_KNOW_A_FORMAT, row_groups=[shard.index])
            rows: list[Row] = [row for batch in islice(batches, 1) for row in batch.to_pylist()]
            return list(table.schema_arrow.names), rows
    found = read_rows(shard, range(min(shard.num_rows, ROWS_TO_KNOW_A_FORMAT)))
    rows = [row for row in found if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise UserError("none of the first rows is a JSON object", field=shard.path, fix="one JSON object per line")
    return names, rows


def _shards_of(uri: str, field: str) -> list[Shard]:
    if uri.startswith(EASY_VQA):
        return [easy_vqa_shard(uri)]
    return [shard for path in _files_of(uri, field) for shard in file_shards(path, field)]


def _files_of(uri: str, field: str) -> list[str]:
    if not uri.strip():
        raise UserError("a source is empty", field=field, value=uri, fix=_FIX)
    is_repository = uri.startswith(HUB) and _is_repository(uri)
    uris = _hub_files(uri, field) if is_repository else list_files(uri, field)
    by_folder: dict[str, dict[str, str]] = defaultdict(dict)
    for path in uris:
        by_folder[parent_folder(path)][PurePosixPath(path).name] = path
    files = [path for folder in sorted(by_folder) for path in _files_of_folder(folder, by_folder[folder], field)]
    if not files:
        raise UserError("there is no file of rows", field=field, value=uri, fix=_FIX)
    return files


def _files_of_folder(folder: str, by_name: Mapping[str, str], field: str) -> list[str]:
    """The files of rows of one folder, which may be what `save_to_disk` wrote."""
    if SPLITS_FILE in by_name:
        splits = ", ".join(f"{folder}/{name}" for name in _read_json(by_name[SPLITS_FILE])["splits"])
        raise UserError("the folder holds several splits", field=field, value=folder, fix=f"give one of {splits}")
    if STATE_FILE in by_name:
        return [f"{folder}/{entry['filename']}" for entry in _read_json(by_name[STATE_FILE])["_data_files"]]
    return [path for name, path in sorted(by_name.items()) if is_readable(path) and name not in _NOT_ROWS]


def _read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def _is_repository(uri: str) -> bool:
    """Whether a hub URI names a whole dataset, `hf://datasets/owner/name[@revision][?split=...]`, not a file in it."""
    path = uri.removeprefix(HUB).partition("?")[0].strip("/")
    return path.startswith("datasets/") and path.count("/") <= 2


def _hub_files(uri: str, field: str) -> list[str]:
    """The files of one split, found as the `datasets` library finds them."""
    from datasets import load_dataset_builder

    path, _, query = uri.removeprefix(HUB + "datasets/").partition("?")
    name, _, revision = path.strip("/").partition("@")
    options = dict(parse_qsl(query))
    split = options.get("split", "train")
    try:
        builder = load_dataset_builder(name, options.get("config"), revision=revision or None)
    # No such dataset, gated, offline, a lost connection in the words of whatever library carries it.
    except Exception as error:  # noqa: BLE001
        raise UserError(f"the hub's dataset cannot be read: {error}", field=field, value=uri) from None
    found = builder.config.data_files or {}
    if split not in found:
        there = ", ".join(map(str, found)) or "none"
        fix = f"add ?split=...; it has: {there}"
        raise UserError(f"the hub's dataset has no split {split!r}", field=field, value=uri, fix=fix)
    return [str(file) for file in found[split]]
