"""Where rows come from: a URI -> segments, each a run of raw rows that is read in one go.

A segment is a row group of a parquet file, a stretch of lines of a JSONL file, or a split of easy-vqa. Segments are
small descriptions: the driver lists them once, workers read the ones they need.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.data.easy_vqa import easy_vqa_rows
from orpo_ray.errors import BadRow, UserError

LINES_PER_SEGMENT = 4096
EASY_VQA = "easy-vqa:"


@dataclass(frozen=True)
class Segment:
    """A run of `num_rows` rows of `path`, the first of which is row `first_row` of that source."""

    kind: str  # "parquet" | "jsonl" | "easy-vqa"
    path: str
    first_row: int
    num_rows: int
    index: int = 0  # parquet: the row group
    offset: int = 0  # jsonl: bytes before the segment
    length: int = 0  # jsonl: bytes of the segment

    def describe(self, row: int) -> str:
        """Where row `row` of this segment stands, as a user would look for it."""
        unit = "line" if self.kind == "jsonl" else "row"
        number = self.first_row + row + (self.kind == "jsonl")
        return f"{self.path}:{unit} {number}"

    @property
    def image_root(self) -> Path | None:
        """The folder that image paths in these rows are relative to, unless the recipe says otherwise."""
        return None if self.kind == "easy-vqa" else Path(self.path).parent


def list_segments(uris: Sequence[str], field: str) -> list[Segment]:
    """All segments of the sources in order. `field` names the recipe's key in errors. Raises UserError."""
    segments = [segment for uri in uris for segment in _segments_of(uri, field)]
    if not sum(segment.num_rows for segment in segments):
        raise UserError("there are no rows", field=field, value=list(uris))
    return segments


def read_segment(segment: Segment, rows: Sequence[int]) -> pa.Table:
    """Rows `rows` of a segment, in that order, undecoded: a parquet table, or one column `json` of lines."""
    if segment.kind == "parquet":
        return pq.ParquetFile(segment.path).read_row_group(segment.index).take(pa.array(rows, pa.int64()))
    if segment.kind == "jsonl":
        with open(segment.path, "rb") as file:
            file.seek(segment.offset)
            # Split as `_jsonl_segments` counts: a lone carriage return is white space within a row.
            lines = [line for line in file.read(segment.length).split(b"\n") if line.strip()]
        return pa.table({"json": pa.array([lines[row] for row in rows], pa.large_binary())})
    all_rows = easy_vqa_rows(segment.path.removeprefix(EASY_VQA))
    return pa.Table.from_pylist([all_rows[row] for row in rows])


def table_rows(table: pa.Table, kind: str) -> Iterator[dict[str, Any] | BadRow]:
    """The raw rows of what `read_segment` returned; a line that is not a JSON object comes as a BadRow."""
    if kind != "jsonl":
        yield from table.to_pylist()
        return
    for line in table["json"].to_pylist():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers too long and nesting too deep to read
            yield BadRow("malformed_row", f"not valid JSON: {error}")
            continue
        yield row if isinstance(row, dict) else BadRow("malformed_row", f"a row must be a JSON object, found {row!r}")


def source_columns(segment: Segment) -> list[str]:
    """Column names of a segment's rows (for JSONL, all that its first 64 rows have)."""
    if segment.kind == "parquet":
        return list(pq.read_schema(segment.path).names)
    rows = table_rows(read_segment(segment, range(min(segment.num_rows, 64))), segment.kind)
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    if names:
        return names
    raise UserError("none of the first rows is a JSON object", field=segment.path, fix="one JSON object per line")


def _segments_of(uri: str, field: str) -> list[Segment]:
    if uri.startswith(EASY_VQA):
        return [Segment("easy-vqa", uri, 0, len(easy_vqa_rows(uri.removeprefix(EASY_VQA))))]
    files = _files_of(uri, field)
    return [segment for path in files for segment in _file_segments(path, field)]


def _files_of(uri: str, field: str) -> list[Path]:
    fix = "give a file, folder or glob of .parquet or .jsonl, or easy-vqa:train"
    if "://" in uri or not uri.strip():
        raise UserError("this kind of source is not supported", field=field, value=uri, fix=fix)
    path = Path(uri).expanduser()
    found = path.rglob("*") if path.is_dir() else (Path(match) for match in glob.glob(str(path), recursive=True))
    existing = sorted(file for file in found if file.is_file())
    files = [file.resolve() for file in existing if file.suffix in (".parquet", ".jsonl")]
    if not existing and not path.is_dir():
        raise UserError("no such file or folder", field=field, value=uri, fix=fix)
    if not files:
        raise UserError("there is no .parquet or .jsonl file", field=field, value=uri, fix=fix)
    return files


def _file_segments(path: Path, field: str) -> list[Segment]:
    try:
        return _parquet_segments(path) if path.suffix == ".parquet" else _jsonl_segments(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot be read: {error}", field=field, value=str(path)) from None


def _parquet_segments(path: Path) -> list[Segment]:
    metadata = pq.read_metadata(path)
    segments, first = [], 0
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        segments.append(Segment("parquet", str(path), first, count, index=group))
        first += count
    return segments


def _jsonl_segments(path: Path) -> list[Segment]:
    """Blank lines are no rows, so a segment's line numbers count the others."""
    segments: list[Segment] = []
    first = count = offset = start = 0
    with open(path, "rb") as file:
        for line in file:
            offset += len(line)
            count += bool(line.strip())
            if count == LINES_PER_SEGMENT:
                segments.append(Segment("jsonl", str(path), first, count, offset=start, length=offset - start))
                first, count, start = first + count, 0, offset
    if count:
        segments.append(Segment("jsonl", str(path), first, count, offset=start, length=offset - start))
    return segments
