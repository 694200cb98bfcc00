"""JSON text -> row."""

from __future__ import annotations

import json
from typing import Any

from orpo_ray.errors import RowError

Row = dict[str, Any]


def parse_json_row(text: bytes) -> Row | RowError:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError includes numbers that are too long
        return RowError("malformed_row", f"not valid JSON: {error}")
    return check_object(row)


def check_object(row: Any) -> Row | RowError:
    if isinstance(row, dict):
        return row
    return RowError("malformed_row", f"a row must be a JSON object, found {repr(row)[:80]}")
