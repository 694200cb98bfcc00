"""`bad_rows.jsonl`: one line per bad row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.storage.run_folder import BAD_ROWS_FILE, METRICS_FILE, RunFolder
from orpo_ray.tracking.generations import Generation
from orpo_ray.tracking.jsonl import keep_lines, read_jsonl


def is_bad_rows_line(line: Mapping[str, Any]) -> bool:
    """Whether a line says which row it is, and why it is bad."""
    return all(isinstance(line.get(name), str) for name in ("source", "reason", "detail")) and "id" in line


class BadRowsFile:
    """Appends bad rows to the run folder, each source once however often its row comes up."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        self._folder = folder
        folder.pull(BAD_ROWS_FILE)
        self._path = folder.path / BAD_ROWS_FILE
        # When a run starts, the file may hold rows that `data check` found; the run finds those that are still bad.
        if step == 0:
            self._path.unlink(missing_ok=True)
        keep_lines(self._path, lambda line: True, is_bad_rows_line)
        self._sources = {line["source"] for line in read_jsonl(self._path)}

    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, step: int) -> BadRowsFile:
        """Open the file; every run has one."""
        return cls(folder, step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing: metrics have their own file."""

    def log_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Write the rows that the file does not hold yet."""
        with self._path.open("a", encoding="utf-8") as file:
            for row in rows:
                if row.source not in self._sources:
                    self._sources.add(row.source)
                    file.write(_line(row))

    def log_generations(self, step: int, generations: Sequence[Generation]) -> None:
        """Do nothing: generations have their own file."""

    def flush(self) -> None:
        """Push the file to a remote run folder."""
        self._folder.push(BAD_ROWS_FILE)

    def close(self) -> None:
        """Push the file."""
        self.flush()


def write_bad_rows(folder: RunFolder, rows: Iterable[BadRow]) -> None:
    """Write `bad_rows.jsonl` before training. Does nothing once a run has begun: the rows that it met stay."""
    if not folder.has(METRICS_FILE):
        (folder.path / BAD_ROWS_FILE).write_text("".join(map(_line, rows)), encoding="utf-8")
        folder.push(BAD_ROWS_FILE)


def _line(row: BadRow) -> str:
    return json.dumps(row.as_line(), ensure_ascii=False) + "\n"
