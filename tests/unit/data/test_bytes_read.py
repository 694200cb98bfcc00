"""A run reads each byte of its data about once per epoch, whatever the number of workers and the size of the shards."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_ray.config.field_types import OtherImage
from orpo_ray.data import shards
from orpo_ray.data.balance import Packing, PairSize, distribute
from orpo_ray.data.groups import Grouping
from orpo_ray.data.order import step_samples
from orpo_ray.data.reading import read_tasks, read_windows
from orpo_ray.data.weighting import weighted_by_group
from orpo_ray.storage import files
from support.sources import spec_of, write_jsonl

ROWS, WINDOW = 1600, 64


class CountingFilesystem:
    """Local files whose bytes are counted when they are read."""

    def __init__(self) -> None:
        self.bytes_read = 0

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(_CountingFile(path, self), mode="r")


class _CountingFile(io.FileIO):
    def __init__(self, path: str, counter: CountingFilesystem) -> None:
        super().__init__(path)
        self._counter = counter

    def read(self, size: int | None = -1, /) -> Any:
        data = super().read(-1 if size is None else size)
        self._counter.bytes_read += len(data)
        return data


def rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    row = {"prompt": "q", "rejected": "y", "images": []}
    return [
        row | {"id": f"r{number}", "chosen": rng.bytes(3000).hex(), "language": f"l{number % 10}"}
        for number in range(ROWS)
    ]


def write(folder: Path, kind: str) -> int:
    """Write the rows; returns the size of the files. A parquet's row groups have 40 rows, 300, or all of them."""
    if kind == "jsonl":
        write_jsonl(folder / "a.jsonl", rows())
    else:
        pq.write_table(pa.Table.from_pylist(rows()), folder / "a.parquet", row_group_size=int(kind))
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("other_image", [None, "exchange"])
@pytest.mark.parametrize("kind", ["40", "300", "1600", "jsonl"])
def test_one_epoch_reads_each_byte_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, other_image: OtherImage | None
) -> None:
    """Other images come from the same window, so they add nothing."""
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 500)
    size = write(tmp_path, kind)
    spec = spec_of([str(tmp_path)], window=WINDOW, other_image=other_image)
    counting = CountingFilesystem()
    for module in (shards, files):
        monkeypatch.setattr(module, "locate", lambda path, field="path": (counting, path))
    samples: list[int] = []
    for windows in read_tasks(spec):  # each in a process of its own
        samples += [index for table in read_windows(spec, windows) for index in table["sample_index"].to_pylist()]
    assert samples == list(range(ROWS))
    assert counting.bytes_read / size <= 1.1


@pytest.mark.parametrize("kind", ["40", "300", "1600", "jsonl"])
def test_weights_of_languages_read_no_byte_more_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The rows of ten languages are parts of the same shards, which are still read once."""
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 500)
    size = write(tmp_path, kind)
    plain = spec_of([str(tmp_path)], window=WINDOW, grouping=Grouping("language"))
    weights = {"language": {f"l{number}": 1.0 for number in range(9)}, "domain": {}}
    spec = replace(weighted_by_group(plain, weights), end_sample=ROWS)
    assert len(spec.order.weights) == 10
    counting = CountingFilesystem()
    for module in (shards, files):
        monkeypatch.setattr(module, "locate", lambda path, field="path": (counting, path))
    samples: list[int] = []
    for windows in read_tasks(spec):
        samples += [index for table in read_windows(spec, windows) for index in table["sample_index"].to_pylist()]
    assert samples == list(range(ROWS))
    assert counting.bytes_read / size <= 1.1


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_workers_divide_what_is_read_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Workers read nothing themselves: each row of the one pipeline goes to exactly one of them."""
    size = write(tmp_path, "300")
    spec = spec_of([str(tmp_path)], window=WINDOW, pairs_per_step=32)
    counting = CountingFilesystem()
    for module in (shards, files):
        monkeypatch.setattr(module, "locate", lambda path, field="path": (counting, path))
    read = [row for windows in read_tasks(spec) for table in read_windows(spec, windows) for row in table.to_pylist()]
    trained: Counter[str] = Counter()
    for step in range(ROWS // 32):
        step_rows = read[slice(*step_samples(step, 32, ROWS))]
        sizes = [PairSize(4, 3, len(row["chosen"]), 1, 0, 0) for row in step_rows]
        for worker in distribute(sizes, workers, Packing(1 << 14, "shared_prefix")):
            trained.update(step_rows[index]["id"] for each in worker for index in each)
    assert trained == Counter(f"r{number}" for number in range(ROWS))
    assert counting.bytes_read / size <= 1.1
