"""Kinds of files that hold rows: each is listed as shards once, and a shard's rows are read in one go.

A shard is a row group of a parquet file, a stretch of lines of a JSONL file, of entries of a JSON list, of samples of
a webdataset tar, or a record batch of an Arrow file. Segments are small descriptions: the driver lists them, and any
process that has one can read its rows, from a disk or from an object store.
"""

from __future__ import annotations

import io
import json
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.errors import RowError, UserError
from orpo_ray.storage.files import is_remote, locate, parent_folder, read_bytes, with_retries
from orpo_ray.tiny_models.easy_vqa import easy_vqa_rows

ROWS_PER_SEGMENT = 4096
BYTES_PER_TAR_SEGMENT = 64 << 20
EASY_VQA = "easy-vqa:"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")

Row = dict[str, Any]


@dataclass(frozen=True)
class Shard:
    """A run of `num_rows` rows of `path`, the first of which is row `first_row` of that file.

    index: parquet's row group. offset, length: the bytes of the shard, where it is read by itself. first_line,
    blanks: of lines: the number of the first one, and before which rows there is an empty one.
    num_bytes: about what its rows weigh as they are stored, without the files that paths in them name.
    """

    kind: str
    path: str
    first_row: int
    num_rows: int
    num_bytes: int = 0
    index: int = 0
    offset: int = 0
    length: int = 0
    first_line: int = 1
    blanks: tuple[int, ...] = ()

    def describe(self, row: int) -> str:
        """Where row `row` of this shard stands, as a user would look for it."""
        if self.kind == "jsonl":
            return f"{self.path}:line {self.first_line + row + bisect_right(self.blanks, row)}"
        return f"{self.path}:row {self.first_row + row}"

    @property
    def image_root(self) -> str | None:
        """The folder that image paths in these rows are relative to, unless the recipe says otherwise."""
        return None if self.kind == "easy-vqa" else parent_folder(self.path)


def file_shards(path: str, field: str) -> list[Shard]:
    """The shards of one file, by its suffix. Raises UserError if it cannot be read."""
    kind = _KINDS[PurePosixPath(path).suffix]
    try:
        return list(with_retries(lambda: list(_LISTED[kind](path))) if is_remote(path) else _LISTED[kind](path))
    except (OSError, pa.ArrowException, tarfile.TarError, ValueError, RecursionError) as error:
        raise UserError(f"cannot be read: {error}", field=field, value=path) from None


def is_readable(path: str) -> bool:
    """Whether a file's name says that it holds rows."""
    return PurePosixPath(path).suffix in _KINDS


def easy_vqa_shard(uri: str) -> Shard:
    """The one shard of a split of easy-vqa, `easy-vqa:train`."""
    return Shard("easy-vqa", uri, 0, len(easy_vqa_rows(uri.removeprefix(EASY_VQA))), num_bytes=4 << 20)


def read_rows(shard: Shard, rows: Sequence[int]) -> list[Row | RowError]:
    """Rows `rows` of a shard, in that order; one that is not a mapping of columns comes as a RowError."""
    if is_remote(shard.path):
        return with_retries(_READ[shard.kind], shard, rows)
    return _READ[shard.kind](shard, rows)


def _list_parquet(path: str) -> Iterator[Shard]:
    filesystem, inner = locate(path)
    with filesystem.open_input_file(inner) as file:
        metadata = pq.read_metadata(file)
    first = 0
    for group in range(metadata.num_row_groups):
        facts = metadata.row_group(group)
        yield Shard("parquet", path, first, facts.num_rows, num_bytes=facts.total_byte_size, index=group)
        first += facts.num_rows


def _read_parquet(shard: Shard, rows: Sequence[int]) -> list[Row | RowError]:
    filesystem, path = locate(shard.path)
    with filesystem.open_input_file(path) as file:
        # A row group in one request a column: without buffering each column chunk would be fetched page by page.
        group = pq.ParquetFile(file, pre_buffer=True).read_row_group(shard.index)
    found: list[Row | RowError] = group.take(pa.array(rows, pa.int64())).to_pylist()
    return found


def _list_jsonl(path: str) -> Iterator[Shard]:
    """Blank lines are no rows."""
    filesystem, inner = locate(path)
    first = count = offset = start = line_number = 0
    first_line, blanks = 1, list[int]()

    def shard() -> Shard:
        size = offset - start
        return Shard(
            "jsonl", path, first, count, size, offset=start, length=size, first_line=first_line, blanks=tuple(blanks)
        )

    with filesystem.open_input_stream(inner, buffer_size=4 << 20) as stream, io.BufferedReader(stream) as file:
        for line in file:
            offset += len(line)
            line_number += 1
            if line.strip():
                count += 1
            else:
                blanks.append(count)
            if count == ROWS_PER_SEGMENT:
                yield shard()
                first, count, start, first_line = first + count, 0, offset, line_number + 1
                blanks.clear()
    if count:
        yield shard()


def _read_jsonl(shard: Shard, rows: Sequence[int]) -> list[Row | RowError]:
    data = read_bytes(shard.path, shard.offset, shard.length)
    # Split as `_list_jsonl` counts: a lone carriage return is white space within a row.
    lines = [line for line in data.split(b"\n") if line.strip()]
    return [_json_row(lines[row]) for row in rows]


def _json_row(text: bytes) -> Row | RowError:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers too long and nesting too deep to read
        return RowError("malformed_row", f"not valid JSON: {error}")
    return _object(row)


def _object(row: Any) -> Row | RowError:
    if isinstance(row, dict):
        return row
    return RowError("malformed_row", f"a row must be a JSON object, found {repr(row)[:80]}")


def _list_json(path: str) -> Iterator[Shard]:
    count = len(_json_list(path))
    size = len(read_bytes(path)) if count else 0
    for first in range(0, count, ROWS_PER_SEGMENT):
        here = min(ROWS_PER_SEGMENT, count - first)
        yield Shard("json", path, first, here, num_bytes=size * here // count)


def _read_json(shard: Shard, rows: Sequence[int]) -> list[Row | RowError]:
    everything = _json_list(shard.path)
    return [_object(everything[shard.first_row + row]) for row in rows]


@lru_cache(maxsize=2)
def _json_list(path: str) -> list[Any]:
    """A JSON list can only be read whole; large sets should be JSONL."""
    try:
        rows = json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        hint = "; one JSON object a line is a .jsonl file" if error.msg == "Extra data" else ""
        raise ValueError(f"not valid JSON: {error}{hint}") from None
    if not isinstance(rows, list):
        raise ValueError(f"a .json file must hold a list of rows, found {type(rows).__name__}")
    return rows


def _list_arrow(path: str) -> Iterator[Shard]:
    """A file of `datasets.save_to_disk`: a stream of record batches, each found again by its offset."""
    filesystem, inner = locate(path)
    with filesystem.open_input_file(inner) as file:
        reader = pa.ipc.open_stream(file)
        first, offset = 0, file.tell()
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            size = file.tell() - offset
            yield Shard("arrow", path, first, batch.num_rows, num_bytes=size, offset=offset, length=size)
            first, offset = first + batch.num_rows, file.tell()


def _read_arrow(shard: Shard, rows: Sequence[int]) -> list[Row | RowError]:
    filesystem, path = locate(shard.path)
    with filesystem.open_input_file(path) as file:
        schema = pa.ipc.open_stream(file).schema
    data = read_bytes(shard.path, shard.offset, shard.length)
    batch = pa.ipc.read_record_batch(pa.ipc.read_message(data), schema)
    found: list[Row | RowError] = batch.take(pa.array(rows, pa.int64())).to_pylist()
    return found


def _list_tar(path: str) -> Iterator[Shard]:
    """Stretches of whole samples; a sample is a run of members with one key."""
    filesystem, inner = locate(path)
    first = count = start = end = 0
    key = None
    with (
        filesystem.open_input_stream(inner, buffer_size=4 << 20) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            if not member.isfile():
                continue
            here = _split_name(member.name)[0]
            if here != key:
                if count == ROWS_PER_SEGMENT or member.offset - start > BYTES_PER_TAR_SEGMENT:
                    size = member.offset - start
                    yield Shard("tar", path, first, count, num_bytes=size, offset=start, length=size)
                    first, count, start = first + count, 0, member.offset
                key, count = here, count + 1
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if count:
        yield Shard("tar", path, first, count, num_bytes=end - start, offset=start, length=end - start)


def _read_tar(shard: Shard, rows: Sequence[int]) -> list[Row | RowError]:
    data = read_bytes(shard.path, shard.offset, shard.length)
    samples: list[tuple[str, list[tuple[str, bytes]]]] = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            key, extension = _split_name(member.name)
            if not samples or samples[-1][0] != key:
                samples.append((key, []))
            content = tar.extractfile(member)
            assert content is not None
            samples[-1][1].append((extension, content.read()))
    return [_sample(*samples[row]) for row in rows]


def _split_name(name: str) -> tuple[str, str]:
    """webdataset's convention: the key ends at the first dot of the last component."""
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}/{stem}", extension.lower()


def _sample(key: str, members: list[tuple[str, bytes]]) -> Row | RowError:
    """One row: the columns of its `.json`, a column for every text (`.prompt.txt`), and its images in order."""
    row: Row = {"id": key.lstrip("/")}
    images: list[bytes] = []
    for extension, content in members:
        kind = extension.rpartition(".")[2]
        if kind == "json":
            columns = _json_row(content)
            if isinstance(columns, RowError):
                return columns
            row |= columns
        elif kind in ("txt", "text"):
            try:
                row[extension.rpartition(".")[0] or "text"] = content.decode()
            except UnicodeDecodeError as error:
                return RowError("malformed_row", f"{extension} is not UTF-8: {error}")
        elif kind in IMAGE_SUFFIXES:
            images.append(content)
    return row | ({"images": images} if images else {})


def _read_easy_vqa(shard: Shard, rows: Sequence[int]) -> list[Row | RowError]:
    everything = easy_vqa_rows(shard.path.removeprefix(EASY_VQA))
    return [everything[row] for row in rows]


_KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "json", ".arrow": "arrow", ".tar": "tar"}
_LISTED: dict[str, Callable[[str], Iterator[Shard]]] = {
    "parquet": _list_parquet,
    "jsonl": _list_jsonl,
    "json": _list_json,
    "arrow": _list_arrow,
    "tar": _list_tar,
}
_READ: dict[str, Callable[[Shard, Sequence[int]], list[Row | RowError]]] = {
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "arrow": _read_arrow,
    "tar": _read_tar,
    "easy-vqa": _read_easy_vqa,
}
