"""Row adapters that change nothing. Some of them take time, so that a run lasts while hardly any CPU is used."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS = 0.02  # per row
# Behind the end of an image. Rows are read until there is half a megabyte of them; these are a few, and not hundreds.
PADDING = bytes(64 << 10)


def quickly(row: dict[str, Any]) -> dict[str, Any]:
    return row


def slowly(row: dict[str, Any]) -> dict[str, Any]:
    time.sleep(SECONDS)
    return row | {"images": [image + PADDING for image in row["images"]]}


def in_turn(row: dict[str, Any]) -> dict[str, Any]:
    """Take time in one process of the machine after the other, so that more encoders are not faster."""
    with open(Path(tempfile.gettempdir()) / f"orpo-ray-slow-rows-{os.getuid()}", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        time.sleep(5 * SECONDS)
    return row
