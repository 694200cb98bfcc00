"""List the sources of a recipe (`data.train`, `data.eval`) as shards of files.

A source is a URI: a local or remote file, folder or glob, a dataset on the Hugging Face hub, or a split of easy-vqa.
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

from orpo_ray.data.json_rows import Row
from orpo_ray.data.shards import (
    EASY_VQA,
    Shard,
    damage_is_an_error_of_the_user,
    easy_vqa_shard,
    has_data_suffix,
    list_file_shards,
    read_rows,
    take_rows,
)
from orpo_ray.errors import UserError
from orpo_ray.storage.files import list_files, locate, one_line, parent_folder, read_bytes

HUB = "hf://"
ROWS_FOR_DETECTION = 64
# Files with metadata about the data files in the same folder.
STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"
MANIFEST_FILE = "manifest.json"
_METADATA_FILES = {STATE_FILE, SPLITS_FILE, MANIFEST_FILE, "dataset_info.json", "dataset_infos.json"}
_FIX = "give .parquet, .jsonl, .json, .tar or .arrow files, a folder or glob of them, or easy-vqa:train"


@dataclass(frozen=True)
class Source:
    """A URI of `data.train` or `data.eval`, with its shards."""

    uri: str
    weight: float
    """Number of times an epoch uses each row; 0.5 uses every second row."""
    shards: tuple[Shard, ...]


def list_sources(weighted_sources: Mapping[str, float], field: str) -> list[Source]:
    """List the shards of all sources.

    Args:
        weighted_sources: URI -> weight.
        field: recipe key, for error messages.

    Raises:
        UserError: a source does not exist, cannot be read, or has no rows.
    """
    sources = [Source(uri, weight, tuple(_shards_of(uri, field))) for uri, weight in weighted_sources.items()]
    for source in sources:
        if not any(shard.num_rows for shard in source.shards):
            raise UserError("the source has no rows", field=field, value=source.uri, fix="remove it from the recipe")
    return sources


def read_first_rows(shard: Shard) -> tuple[list[str], list[Row]]:
    """Read the column names and the first rows of a shard, to detect its format. Raises UserError."""
    if shard.kind == "parquet":
        with damage_is_an_error_of_the_user(shard):
            return _first_parquet_rows(shard)
    found = read_rows(shard, range(min(shard.num_rows, ROWS_FOR_DETECTION)))
    rows = [row for row in found if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise UserError(
            "none of the first rows is a JSON object", field=shard.path, fix="write one JSON object per row"
        )
    return names, rows


def _first_parquet_rows(shard: Shard) -> tuple[list[str], list[Row]]:
    filesystem, path = locate(shard.path)
    with filesystem.open_input_file(path) as file:
        table = pq.ParquetFile(file)
        batches = table.iter_batches(batch_size=ROWS_FOR_DETECTION, row_groups=[shard.index])
        found = [row for batch in islice(batches, 1) for row in take_rows(batch, range(batch.num_rows))]
        return list(table.schema_arrow.names), [row for row in found if isinstance(row, dict)]


def origins(uri: str) -> list[str]:
    """Return the sources that a folder of `orpo-ray data prepare` was made from; for any other source, itself."""
    folder, _, split = uri.rstrip("/").rpartition("/")
    if not folder or uri.startswith((HUB, EASY_VQA)) or has_data_suffix(uri):
        return [uri]
    try:
        data = json.loads(read_bytes(f"{folder}/{MANIFEST_FILE}"))["data"]
        return [str(source) for source in data[split] or data["train"]] or [uri]
    except (OSError, UserError, ValueError, LookupError, TypeError):
        return [uri]


def _shards_of(uri: str, field: str) -> list[Shard]:
    if uri.startswith(EASY_VQA):
        return [easy_vqa_shard(uri)]
    return [shard for path in _files_of(uri, field) for shard in list_file_shards(path, field)]


def _files_of(uri: str, field: str) -> list[str]:
    if not uri.strip():
        raise UserError("the URI of a source is empty", field=field, value=uri, fix=_FIX)
    is_repository = uri.startswith(HUB) and _is_repository(uri)
    uris = _hub_files(uri, field) if is_repository else list_files(uri, field)
    by_folder: dict[str, dict[str, str]] = defaultdict(dict)
    for path in uris:
        by_folder[parent_folder(path)][PurePosixPath(path).name] = path
    files = [path for folder in sorted(by_folder) for path in _files_of_folder(folder, by_folder[folder], field)]
    if not files:
        raise UserError("no data files found", field=field, value=uri, fix=_FIX)
    return files


def _files_of_folder(folder: str, by_name: Mapping[str, str], field: str) -> list[str]:
    """Return the data files of a folder, which may be the output of `save_to_disk`."""
    if SPLITS_FILE in by_name:
        splits = ", ".join(f"{folder}/{name}" for name in _names_in(by_name[SPLITS_FILE], "splits", field))
        raise UserError("the folder contains several splits", field=field, value=folder, fix=f"give one of {splits}")
    if STATE_FILE in by_name:
        return [f"{folder}/{name}" for name in _names_in(by_name[STATE_FILE], "_data_files", field)]
    return [path for name, path in sorted(by_name.items()) if has_data_suffix(path) and name not in _METADATA_FILES]


def _names_in(uri: str, key: str, field: str) -> list[str]:
    """Return the names that a metadata file of `save_to_disk` lists under a key."""
    try:
        found: Any = json.loads(read_bytes(uri))[key]
        return [str(each["filename"] if isinstance(each, dict) else each) for each in found]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        problem = f"cannot read the file: {type(error).__name__}: {one_line(error)}"
        raise UserError(problem, field=field, value=uri, fix="write the folder again with save_to_disk") from None


def _is_repository(uri: str) -> bool:
    """Whether a hub URI names a dataset, `hf://datasets/owner/name[@revision][?split=...]`, and not a file in one."""
    path = uri.removeprefix(HUB).partition("?")[0].strip("/")
    return path.startswith("datasets/") and path.count("/") <= 2


def _hub_files(uri: str, field: str) -> list[str]:
    """List the files of a split as the `datasets` library does."""
    from datasets import load_dataset_builder

    path, _, query = uri.removeprefix(HUB + "datasets/").partition("?")
    name, _, revision = path.strip("/").partition("@")
    options = dict(parse_qsl(query))
    split = options.get("split", "train")
    try:
        builder = load_dataset_builder(name, options.get("config"), revision=revision or None)
    # A missing or gated dataset and a lost connection raise errors of several libraries.
    except Exception as error:  # noqa: BLE001
        raise UserError(
            f"cannot read the dataset from the hub: {error}",
            field=field,
            value=uri,
            fix="check the name and the network; for private and gated datasets, set HF_TOKEN",
        ) from None
    found = builder.config.data_files or {}
    if split not in found:
        fix = f"add ?split=NAME; the splits are: {', '.join(map(str, found)) or 'none'}"
        raise UserError(f"the dataset has no split {split!r}", field=field, value=uri, fix=fix)
    return [str(file) for file in found[split]]
