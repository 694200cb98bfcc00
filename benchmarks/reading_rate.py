"""How fast one task reads the rows of a run, for all its workers.

    python benchmarks/reading_rate.py [--rows N] [--kb N[,N...]] [--rounds N] [--json]

Writes a parquet of pairs with one image each, of so many kB, and reads it as the reading task of a run does
(`read_windows`): shuffled within windows, rows with equal images together, as task batches. Reading does not decode
images, so random bytes, which compress as little as JPEG, stand for them. The file was just written, so it comes from
the page cache: this is the limit of the CPU and not of a disk. Ray's copy of the batches into the object store is not
part of it. Rates are by CPU time of all threads, which other programs on the machine disturb little; `cores` is that
time over the time on the clock. The median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import provenance

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.from_recipe import run_data
from orpo_ray.data.reading import ReadSpec, read_tasks, read_windows

ANSWER = "The photograph shows a red bus at a stop, and two people who wait to get on. "


def write_pairs(path: Path, rows: int, image_bytes: int) -> None:
    """Write pairs, each with an image of its own."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, _table(rng, 1, 1).schema) as writer:
        for first in range(0, rows, 100):
            writer.write_table(_table(rng, min(100, rows - first), image_bytes))


def _table(rng: np.random.Generator, rows: int, image_bytes: int) -> pa.Table:
    texts = {"prompt": "What is there?", "chosen": 5 * ANSWER, "rejected": 6 * ANSWER}
    return pa.Table.from_pylist([texts | {"image": {"bytes": rng.bytes(image_bytes)}} for _ in range(rows)])


def read_all(read: ReadSpec) -> tuple[float, float]:
    """Read all rows. Returns the seconds of CPU time and on the clock."""
    cpu, clock, rows = time.process_time(), time.perf_counter(), 0
    for windows in read_tasks(read):
        for table in read_windows(read, windows):
            rows += table.num_rows
            if table["bad"].null_count != table.num_rows:
                raise SystemExit("the set should have no bad rows")
    if rows != read.end_sample:
        raise SystemExit(f"{rows} of {read.end_sample} rows were read")
    return time.process_time() - cpu, time.perf_counter() - clock


def measure(rows: int, image_bytes: int, rounds: int) -> dict[str, float]:
    """Write a file and read it some times."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.parquet"
        write_pairs(path, rows, image_bytes)
        raw = {"name": "reading", "model": {"id": "orpo-ray/tiny-smolvlm"}, "data": {"train": str(path)}}
        read, _ = run_data(parse_recipe(raw))
        cpu, clock = zip(*(read_all(read) for _ in range(rounds)), strict=True)
        size = path.stat().st_size
    seconds = statistics.median(cpu)
    return {
        "image_kb": image_bytes / 1e3,
        "rows": rows,
        "rows_per_cpu_s": round(rows / seconds),
        "mb_per_cpu_s": round(size / seconds / 1e6, 1),
        "rows_per_s": round(rows / statistics.median(clock)),
        "cores": round(seconds / statistics.median(clock), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kb", default="2,20,200", help="sizes of an image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    sizes = [round(float(size) * 1000) for size in arguments.kb.split(",")]
    found = [measure(arguments.rows, size, arguments.rounds) for size in sizes]
    if arguments.json:
        print(json.dumps(provenance() | {"sizes": found}))
        return
    for row in found:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print("\n".join(f"{name:12} {value}" for name, value in provenance().items()))


if __name__ == "__main__":
    main()
