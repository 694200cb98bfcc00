"""List the shards of data files, and read the rows of a shard, for each file type.

A shard is a row group of a parquet file, a record batch of an Arrow file, or a range of rows of a JSONL file, JSON list
or webdataset tar. The driver lists the shards once; any process can then read the rows of a shard, from a disk or from
an object store.
"""

from __future__ import annotations

import io
import json
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.data.json_rows import Row, check_object, parse_json_row
from orpo_ray.data.webdataset import row_of_sample, split_name
from orpo_ray.errors import RowError, UserError
from orpo_ray.storage.files import (
    is_permanent,
    is_remote,
    locate,
    one_line,
    parent_folder,
    read_bytes,
    with_retries,
)
from orpo_ray.tiny_models.easy_vqa import easy_vqa_rows

ROWS_PER_SHARD = 4096
BYTES_PER_TAR_SHARD = 64 << 20
EASY_VQA = "easy-vqa:"

_FOOTERS = 64  # parquet footers that a reader keeps

TakeRows = Callable[[Sequence[int]], list[Row | RowError]]


@dataclass(frozen=True)
class Shard:
    """A range of rows of a file."""

    kind: str
    """File type: parquet, jsonl, json, arrow, tar or easy-vqa."""
    path: str
    """Local path or URI of the file."""
    first_row: int
    """Index in the file of the shard's first row."""
    num_rows: int
    """Number of rows."""
    num_bytes: int = 0
    """Approximate size of the rows as stored, without image files that they refer to by path."""
    index: int = 0
    """Parquet: the row group."""
    offset: int = 0
    """JSONL, Arrow, tar: position of the shard's first byte in the file."""
    length: int = 0
    """JSONL, Arrow, tar: size of the shard in bytes."""
    first_line: int = 1
    """JSONL: line number of the first row."""
    blanks: tuple[int, ...] = ()
    """JSONL: for each blank line, the index in the shard of the row after it."""

    def describe(self, row: int) -> str:
        """Return file and line, or file and row, of row `row` of this shard, for messages."""
        if self.kind == "jsonl":
            return f"{self.path}:line {self.first_line + row + bisect_right(self.blanks, row)}"
        return f"{self.path}:row {self.first_row + row}"

    @property
    def image_root(self) -> str | None:
        """Folder that image paths in these rows are relative to by default; the recipe can set another one."""
        return None if self.kind == "easy-vqa" else parent_folder(self.path)


def list_file_shards(path: str, field: str) -> list[Shard]:
    """List the shards of a file; its suffix determines the file type. Raises UserError if it cannot be read."""
    if not has_data_suffix(path):
        raise UserError("not a data file", field=field, value=path, fix=f"give one of {', '.join(_KINDS)}")
    list_shards = _LIST[_KINDS[PurePosixPath(path).suffix]]
    try:
        return with_retries(lambda: list(list_shards(path))) if is_remote(path) else list(list_shards(path))
    except (OSError, pa.ArrowException, tarfile.TarError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read the file: {one_line(error)}",
            field=field,
            value=path,
            fix="check that the content of the file matches its suffix",
        ) from None


@contextmanager
def damage_is_an_error_of_the_user(shard: Shard) -> Iterator[None]:
    """Turn errors of reading a shard that another attempt would meet again into a UserError."""
    try:
        yield
    except (OSError, pa.ArrowException, tarfile.TarError, ValueError, RecursionError) as error:
        if not is_permanent(error):
            raise
        rows = f"rows {shard.first_row} to {shard.first_row + shard.num_rows - 1}"
        problem = f"{rows} cannot be read: {one_line(error) or type(error).__name__}"
        fix = "copy or write the file again, or remove it from the data"
        raise UserError(problem, field=shard.path, fix=fix) from None


def has_data_suffix(path: str) -> bool:
    """Whether the suffix of a file name is that of a data file."""
    return PurePosixPath(path).suffix in _KINDS


def easy_vqa_shard(uri: str) -> Shard:
    """Return the shard of a split of easy-vqa, such as `easy-vqa:train`. A split is one shard."""
    return Shard("easy-vqa", uri, 0, len(easy_vqa_rows(uri.removeprefix(EASY_VQA))), num_bytes=4 << 20)


def read_rows(shard: Shard, rows: Sequence[int]) -> list[Row | RowError]:
    """Read rows of a shard by their index in the shard, in the given order. An invalid row is a RowError."""
    return ShardReader().open(shard)(rows)


class ShardReader:
    """Reads shards one after another, each once, although rows of the last one are wanted several times."""

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        """Make a reader; `columns` are those to read where a file is stored by columns, by default all."""
        self._columns = columns
        self._last: tuple[Shard, TakeRows] | None = None
        self._footers: dict[str, pq.FileMetaData] = {}

    def holds(self, shard: Shard) -> bool:
        """Whether this shard was the last one."""
        return self._last is not None and self._last[0] == shard

    def release(self) -> None:
        """Free the last shard's memory."""
        self._last = None

    def open(self, shard: Shard) -> TakeRows:
        """Read a shard, unless it was the last one. Returns what takes rows of it by their index in the shard.

        Raises:
            UserError: the file is damaged or no longer there.
            OSError: the file cannot be read at the moment.
        """
        if self._last is not None and self._last[0] == shard:
            return self._last[1]
        self.release()  # before the next shard needs the memory
        with damage_is_an_error_of_the_user(shard):
            take = with_retries(self._read, shard) if is_remote(shard.path) else self._read(shard)
        self._last = (shard, take)
        return take

    def _read(self, shard: Shard) -> TakeRows:
        return self._read_parquet(shard) if shard.kind == "parquet" else _READ[shard.kind](shard)

    def _read_parquet(self, shard: Shard) -> TakeRows:
        filesystem, path = locate(shard.path)
        with filesystem.open_input_file(path) as file:
            # pre_buffer reads each column chunk with one request instead of one per page. A footer is read once per
            # file: with small row groups, it is a large part of what would be read.
            opened = pq.ParquetFile(file, metadata=self._footers.get(shard.path), pre_buffer=True)
            self._footers[shard.path] = opened.metadata
            if len(self._footers) > _FOOTERS:
                self._footers.pop(next(iter(self._footers)))
            columns = self._columns
            if columns is not None and not (columns := [name for name in columns if name in opened.schema_arrow.names]):
                return lambda rows: [{} for _ in rows]
            group = opened.read_row_group(shard.index, columns)
        _check_rows(group.num_rows, shard)
        return partial(take_rows, group)


def _check_rows(found: int, shard: Shard) -> None:
    """Raise ValueError if a file has other rows than when it was listed, as one that was shortened since."""
    if found != shard.num_rows:
        raise ValueError(f"the file has changed: of {shard.num_rows:,} rows there, {found:,} are left")


def _list_parquet(path: str) -> Iterator[Shard]:
    filesystem, inner = locate(path)
    with filesystem.open_input_file(inner) as file:
        metadata = pq.read_metadata(file)
    first = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        yield Shard("parquet", path, first, row_group.num_rows, num_bytes=row_group.total_byte_size, index=group)
        first += row_group.num_rows


def take_rows(table: pa.Table | pa.RecordBatch, rows: Sequence[int]) -> list[Row | RowError]:
    """Take rows of a table, in the given order. A row with a value that Python cannot read is a RowError."""
    taken = table.take(pa.array(rows, pa.int64()))
    try:
        return taken.to_pylist()
    except (ValueError, OverflowError):
        return [_take_row(taken, row) for row in range(len(rows))]


def _take_row(table: pa.Table | pa.RecordBatch, row: int) -> Row | RowError:
    try:
        found: Row = table.slice(row, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date that Python does not have
        return RowError("malformed_row", f"a value cannot be read: {one_line(error)}")
    return found


def _list_jsonl(path: str) -> Iterator[Shard]:
    """List ranges of lines. Blank lines are not rows."""
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
            if count == ROWS_PER_SHARD:
                yield shard()
                first, count, start, first_line = first + count, 0, offset, line_number + 1
                blanks.clear()
    if count:
        yield shard()


def _read_jsonl(shard: Shard) -> TakeRows:
    data = read_bytes(shard.path, shard.offset, shard.length)
    # Split at line feeds only, as `_list_jsonl` counts: a lone carriage return is white space within a row.
    lines = [line for line in data.split(b"\n") if line.strip()]
    _check_rows(len(lines), shard)
    return lambda rows: [parse_json_row(lines[row]) for row in rows]


def _list_json(path: str) -> Iterator[Shard]:
    count = len(_read_json_list(path))
    size = len(read_bytes(path)) if count else 0
    for first in range(0, count, ROWS_PER_SHARD):
        num_rows = min(ROWS_PER_SHARD, count - first)
        yield Shard("json", path, first, num_rows, num_bytes=size * num_rows // count)


def _read_json(shard: Shard) -> TakeRows:
    all_rows = _read_json_list(shard.path)
    _check_rows(len(all_rows[shard.first_row :][: shard.num_rows]), shard)
    return lambda rows: [check_object(all_rows[shard.first_row + row]) for row in rows]


@lru_cache(maxsize=2)
def _read_json_list(path: str) -> list[Any]:
    """Read a JSON list, which is possible only as a whole. Large datasets should be JSONL."""
    try:
        rows = json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        hint = "; a file with one JSON object per line must be named .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"not valid JSON: {error}{hint}") from None
    if not isinstance(rows, list):
        raise ValueError(f"a .json file must contain a list of rows, found {type(rows).__name__}")
    return rows


def _list_arrow(path: str) -> Iterator[Shard]:
    """List the record batches of a file that `datasets.save_to_disk` wrote, with the offset of each."""
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


def _read_arrow(shard: Shard) -> TakeRows:
    filesystem, path = locate(shard.path)
    with filesystem.open_input_file(path) as file:
        schema = pa.ipc.open_stream(file).schema
    data = read_bytes(shard.path, shard.offset, shard.length)
    batch = pa.ipc.read_record_batch(pa.ipc.read_message(data), schema)
    batch.validate(full=True)  # a damaged offset would end the process
    _check_rows(batch.num_rows, shard)
    return partial(take_rows, batch)


def _list_tar(path: str) -> Iterator[Shard]:
    """List ranges of complete samples. A sample is a sequence of members with the same key."""
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
            member_key = split_name(member.name)[0]
            if member_key != key:
                if count == ROWS_PER_SHARD or member.offset - start > BYTES_PER_TAR_SHARD:
                    size = member.offset - start
                    yield Shard("tar", path, first, count, num_bytes=size, offset=start, length=size)
                    first, count, start = first + count, 0, member.offset
                key, count = member_key, count + 1
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if count:
        yield Shard("tar", path, first, count, num_bytes=end - start, offset=start, length=end - start)


def _read_tar(shard: Shard) -> TakeRows:
    data = read_bytes(shard.path, shard.offset, shard.length)
    samples: list[tuple[str, list[tuple[str, bytes]]]] = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            key, extension = split_name(member.name)
            if not samples or samples[-1][0] != key:
                samples.append((key, []))
            content = tar.extractfile(member)
            assert content is not None
            samples[-1][1].append((extension, content.read()))
    _check_rows(len(samples), shard)
    return lambda rows: [row_of_sample(*samples[row]) for row in rows]


def _read_easy_vqa(shard: Shard) -> TakeRows:
    all_rows = easy_vqa_rows(shard.path.removeprefix(EASY_VQA))
    return lambda rows: [all_rows[row] for row in rows]


_KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "json", ".arrow": "arrow", ".tar": "tar"}
_LIST: dict[str, Callable[[str], Iterator[Shard]]] = {
    "parquet": _list_parquet,
    "jsonl": _list_jsonl,
    "json": _list_json,
    "arrow": _list_arrow,
    "tar": _list_tar,
}
_READ: dict[str, Callable[[Shard], TakeRows]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "arrow": _read_arrow,
    "tar": _read_tar,
    "easy-vqa": _read_easy_vqa,
}
