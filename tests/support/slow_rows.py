"""Row adapters that change nothing. One of them takes time, so that a run lasts while hardly any CPU is used."""

from __future__ import annotations

import time
from typing import Any

SECONDS = 0.02  # per row
# Behind the end of an image. Rows are read until there is half a megabyte of them; these are a few, and not hundreds.
PADDING = bytes(64 << 10)


def quickly(row: dict[str, Any]) -> dict[str, Any]:
    return row


def slowly(row: dict[str, Any]) -> dict[str, Any]:
    time.sleep(SECONDS)
    return row | {"images": [image + PADDING for image in row["images"]]}
