"""A dataset with ten kinds of bad rows."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from support.tiny_runs import write_pairs

KINDS = (
    "malformed_row", "missing_image", "unreadable_image", "unsafe_path", "empty_response",
    "identical_responses", "image_count_mismatch", "too_long", "empty_prompt", "image_too_large",
)  # fmt: skip


def write_broken(folder: Path, count: int, of_each: int) -> tuple[Path, dict[str, str]]:
    """Write `count` rows with `of_each` bad rows of each kind. Returns the file, and source -> reason of bad rows."""
    path = write_pairs(folder, count)
    rows: list[Any] = [json.loads(line) for line in path.read_text().splitlines()]
    images = folder / "images"
    (images / "torn.png").write_bytes((folder / rows[0]["images"][0]).read_bytes()[:50])
    (images / "bomb.png").write_bytes(_bomb())
    places = [number * count // (of_each * len(KINDS)) + 3 for number in range(of_each * len(KINDS))]
    broken = {}
    for number, place in enumerate(places):
        kind = KINDS[number % len(KINDS)]
        rows[place] = _break(rows[place], kind)
        broken[f"{path}:line {place + 1}"] = kind
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path, broken


def _break(row: dict[str, Any], kind: str) -> Any:
    changes: dict[str, Any] = {
        "missing_image": {"images": ["images/none.png"]},
        "unreadable_image": {"images": ["images/torn.png"]},
        "unsafe_path": {"images": ["../../etc/hostname"]},
        "empty_response": {"chosen": " "},
        "identical_responses": {"rejected": row["chosen"]},
        "image_count_mismatch": {"images": row["images"] * 2},
        "too_long": {"chosen": "long " * 300},
        "empty_prompt": {"prompt": "  "},
        "image_too_large": {"images": ["images/bomb.png"]},
    }
    return "{broken" if kind == "malformed_row" else row | changes[kind]


def _bomb() -> bytes:
    """A small PNG whose header claims 30,000 x 30,000 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)
