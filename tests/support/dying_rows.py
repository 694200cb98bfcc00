"""A row adapter that ends its process a few times, so that Ray Data gives up on the task that reads the row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

DEATHS, ROW, TIMES = "ORPO_RAY_TEST_DEATHS", "ORPO_RAY_TEST_DEADLY_ROW", 6


def dying(row: dict[str, Any]) -> dict[str, Any]:
    """Change nothing. The first `TIMES` times that it sees the row, it ends its process instead."""
    if str(row["id"]) == os.environ[ROW]:
        with Path(os.environ[DEATHS]).open("ab") as file:
            if file.tell() < TIMES:
                file.write(b".")
                file.flush()
                os._exit(1)
    return row
