"""`orpo-ray data prepare`: write all usable pairs as sharded parquet files with a manifest.

Training and sweeps that read these files download no images, meet no bad rows and detect no formats.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow, check_bad_fraction, refuse_rows
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.from_recipe import all_data, encoder_of
from orpo_ray.data.reading import ReadSpec
from orpo_ray.data.sources import MANIFEST_FILE
from orpo_ray.data_report.progress import RowProgress
from orpo_ray.data_report.scan import clean_schema, iter_clean
from orpo_ray.errors import UserError
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.files import locate, with_retries
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.bad_rows_file import write_bad_rows

PREPARED = "data"
# A reader holds at least one row group in memory; a file is uploaded as a whole.
GROUP_ROWS, GROUP_BYTES = 1024, 32 << 20
FILE_BYTES = 512 << 20


@dataclass
class Prepared:
    """A split that was written."""

    uri: str
    """Path or URI of its folder."""
    shards: dict[str, int] = field(default_factory=dict)
    """File name -> number of rows."""
    bad: list[BadRow] = field(default_factory=list)
    """Rows that were left out."""

    @property
    def rows(self) -> int:
        """Number of pairs."""
        return sum(self.shards.values())

    def as_json(self) -> dict[str, Any]:
        """Return what the manifest says about it."""
        return {"rows": self.rows, "bad_rows": len(self.bad), "shards": self.shards}


def prepare_data(recipe: Recipe, console: Console) -> dict[str, Prepared]:
    """Write the usable pairs of a recipe to its run folder.

    Args:
        recipe: the recipe.
        console: for progress.

    Returns:
        Split name -> what was written.

    Raises:
        UserError: the data is already prepared, cannot be read, or has more bad rows than the recipe allows.
    """
    recipe = recipe.with_absolute_paths()
    folder = RunFolder(recipe.run_uri)
    if folder.has(f"{PREPARED}/{MANIFEST_FILE}"):
        fix = "delete the folder, or change the name of the run (name=...)"
        raise UserError("the prepared data already exists", field=f"{folder.uri}/{PREPARED}", fix=fix)
    train, held_out = all_data(recipe)
    encoder = encoder_of(recipe)
    encoder.build()
    folder.make()
    start_ray()
    splits = {"train": train} | ({"eval": held_out} if held_out else {})
    written = {
        name: write_split(f"{folder.uri}/{PREPARED}/{name}", read, encoder, console) for name, read in splits.items()
    }
    write_bad_rows(folder, (row for split in written.values() for row in split.bad))
    bad = written["train"].bad
    refuse_rows(recipe, bad)
    check_bad_fraction(recipe, len(bad), train.end_sample, bad, at_end=True)
    # Written last, so that a folder with a manifest is complete.
    _write_text(f"{folder.uri}/{PREPARED}/{MANIFEST_FILE}", json.dumps(_manifest(recipe, written), indent=2))
    return written


def write_split(uri: str, read: ReadSpec, encoder: EncoderSpec, console: Console) -> Prepared:
    """Write the usable pairs of a split, in order, on the Ray that runs.

    Args:
        uri: the folder; what it holds is deleted.
        read: the rows.
        encoder: how they must be encodable.
        console: for progress.

    Raises:
        UserError: a file is damaged or no longer there.
    """
    filesystem, path = locate(uri, "checkpoint.storage")
    with_retries(filesystem.create_dir, path, recursive=True)
    with_retries(filesystem.delete_dir_contents, path)  # files of an interrupted attempt
    split, writer = Prepared(uri), _ParquetFiles(filesystem, path, clean_schema(read.grouping))
    encoders = max(1, int(ray.cluster_resources().get("CPU", 1)))
    with RowProgress(console, f"preparing {uri.rpartition('/')[2]}", read.end_sample) as progress:
        for table, bad in iter_clean(read, encoder, encoders):
            writer.add(table)
            split.bad += bad
            progress.advance(table.num_rows + len(bad))
    split.shards = writer.close()
    return split


class _ParquetFiles:
    """Writes tables to parquet files of about FILE_BYTES, in row groups of limited size."""

    def __init__(self, filesystem: pafs.FileSystem, folder: str, schema: pa.Schema) -> None:
        self.filesystem, self.folder, self.schema = filesystem, folder, schema
        self.shards: dict[str, int] = {}
        self._tables: list[pa.Table] = []
        self._group_rows = self._group_bytes = self._file_bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        self._tables.append(table)
        self._group_rows += table.num_rows
        self._group_bytes += table.nbytes
        if self._group_rows >= GROUP_ROWS or self._group_bytes >= GROUP_BYTES:
            self._write_group()

    def close(self) -> dict[str, int]:
        """Write the remaining rows. Returns file name -> number of rows."""
        if self._group_rows:
            self._write_group()
        self._end_file()
        return self.shards

    def _write_group(self) -> None:
        if self._writer is None:
            name = f"{len(self.shards):05d}.parquet"
            # zstd reduces texts to a third; images are already compressed.
            self._writer = pq.ParquetWriter(
                f"{self.folder}/{name}", self.schema, filesystem=self.filesystem, compression="zstd"
            )
            self.shards[name] = 0
        self._writer.write_table(pa.concat_tables(self._tables), row_group_size=self._group_rows)
        self.shards[list(self.shards)[-1]] += self._group_rows
        self._file_bytes += self._group_bytes
        self._tables, self._group_rows, self._group_bytes = [], 0, 0
        if self._file_bytes >= FILE_BYTES:
            self._end_file()

    def _end_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._file_bytes = None, 0


def _manifest(recipe: Recipe, written: dict[str, Prepared]) -> dict[str, Any]:
    """Describe what was written, and from which sources."""
    return {
        "format": "trl",
        "model": recipe.model.id,
        "data": recipe.model_dump(mode="json")["data"],
        "splits": {name: split.as_json() for name, split in written.items()},
    }


def _write_text(uri: str, text: str) -> None:
    filesystem, path = locate(uri, "checkpoint.storage")

    def write() -> None:
        with filesystem.open_output_stream(path) as file:
            file.write(text.encode())

    with_retries(write)
