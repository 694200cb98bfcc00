"""The JSON Lines files of a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read all lines of a file; none if the file does not exist. A last line cut off by a kill is left out."""
    if not path.exists():
        return []
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in (*lines, last) if line]
    except json.JSONDecodeError:
        return [json.loads(line) for line in lines if line]


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file with the wanted lines only, and without a last line that a kill cut off."""
    if path.exists():
        lines = read_jsonl(path)
        scratch = path.with_suffix(".tmp")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines if wanted(line))
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
