"""Write small data sources, and read them."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from orpo_ray.data.order import Order
from orpo_ray.data.reading import ReadSpec, read_windows
from orpo_ray.data.shards import Shard, read_rows
from orpo_ray.data.sources import list_sources


def rows(count: int, image: Any = None) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "prompt": f"q{i}", "chosen": "x", "rejected": "y", "images": image or []} for i in range(count)
    ]


def write_jsonl(path: Path, items: list[Any]) -> Path:
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items) + "\n")
    return path


def read_all(spec: ReadSpec, epoch: int = 0) -> list[dict[str, Any]]:
    windows = [(epoch, number) for number in range(spec.order.windows_per_epoch)]
    return [row for table in read_windows(spec, windows) for row in table.to_pylist()]


def list_shards(*uris: str) -> list[Shard]:
    return [shard for source in list_sources(dict.fromkeys(uris, 1.0), "data.train") for shard in source.shards]


def ids_of(*uris: str) -> list[str]:
    """Read the ids of all rows, in the order of the shards."""
    shards = list_shards(*uris)
    return [row["id"] for each in shards for row in read_rows(each, range(each.num_rows)) if isinstance(row, dict)]


def spec_of(uris: list[str], **changes: Any) -> ReadSpec:
    shards = tuple(list_shards(*uris))
    counts = tuple(shard.num_rows for shard in shards)
    order = Order(counts, changes.pop("seed", 0), changes.pop("window", 7))
    base = ReadSpec(shards, ("trl",) * len(shards), order, 4, 0, order.num_rows)
    return replace(base, **changes)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
