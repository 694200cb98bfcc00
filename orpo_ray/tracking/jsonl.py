"""The JSON Lines files of a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo_ray.errors import UserError


def read_jsonl(path: Path, is_whole: Callable[[dict[str, Any]], bool] = lambda line: True) -> list[dict[str, Any]]:
    """Read all lines of a file; none if the file does not exist. A last line cut off by a kill is left out.

    Args:
        path: the file.
        is_whole: whether a line has what its readers need; others are damaged.

    Raises:
        UserError: another line is damaged.
    """
    lines, damaged = read_whole_lines(path, is_whole)
    if damaged:
        raise damaged_lines(str(path), damaged)
    return lines


def read_whole_lines(
    path: Path, is_whole: Callable[[dict[str, Any]], bool] = lambda line: True
) -> tuple[list[dict[str, Any]], list[int]]:
    """Read the lines of a file that are not damaged; none if the file does not exist.

    Args:
        path: the file.
        is_whole: whether a line has what its readers need; others are damaged.

    Returns:
        The lines, and the numbers of the damaged ones, from 1. A last line cut off by a kill is in neither.
    """
    if not path.exists():
        return [], []
    lines: list[dict[str, Any]] = []
    damaged: list[int] = []
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, start=1):
        if not text:
            continue
        try:
            line = json.loads(text.decode())
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and is_whole(line):
            lines.append(line)
        elif number < len(texts):
            damaged.append(number)
    return lines, damaged


def damaged_lines(file: str, numbers: list[int]) -> UserError:
    """Return the error that names the damaged lines of a file."""
    what = f"line {numbers[0]:,} is damaged"
    if len(numbers) > 1:
        what = f"{len(numbers):,} lines are damaged, the first of them line {numbers[0]:,}"
    return UserError(what, field=file, fix=f"delete the damaged {'lines' if len(numbers) > 1 else 'line'}")


def keep_lines(
    path: Path,
    wanted: Callable[[dict[str, Any]], bool],
    is_whole: Callable[[dict[str, Any]], bool] = lambda line: True,
) -> None:
    """Rewrite a file with the wanted lines only, and without a last line that a kill cut off.

    Args:
        path: the file, which need not exist.
        wanted: whether to keep a line that is not damaged.
        is_whole: whether a line has what its readers need; others are damaged.

    Raises:
        UserError: a line is damaged.
    """
    if path.exists():
        lines = read_jsonl(path, is_whole)
        scratch = path.with_suffix(".tmp")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines if wanted(line))
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
