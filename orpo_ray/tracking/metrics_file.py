"""`metrics.jsonl`: one line per logged step, and one per restart."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.storage.run_folder import METRICS_FILE, RunFolder
from orpo_ray.tracking.generations import Generation
from orpo_ray.tracking.jsonl import keep_lines, read_jsonl

RESTARTS = "train/restarts"
"""How often the run was started again, by Ray or by the user."""
REPEATED = "train/repeated_steps"
"""Logged steps that were lost and made again, over all restarts."""


def is_metrics_line(line: Mapping[str, object]) -> bool:
    """Whether a line has a step, and numbers or None for its metrics."""
    numbers = (value for value in line.values() if value is not None)
    has_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
    return has_numbers and isinstance(line.get("step"), int)


class MetricsFile:
    """Appends metrics to the run folder; drops the lines of steps that a resumed run repeats."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        self._folder = folder
        folder.pull(METRICS_FILE)
        path = folder.path / METRICS_FILE
        is_restart = path.exists()
        lines = read_jsonl(path, is_metrics_line)
        keep_lines(path, lambda line: line["step"] <= step)
        self._file = path.open("a", encoding="utf-8")
        if is_restart:
            repeated = {line["step"] for line in lines if line["step"] > step}
            self.log(step, {RESTARTS: _latest(lines, RESTARTS) + 1, REPEATED: _latest(lines, REPEATED) + len(repeated)})

    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, step: int) -> MetricsFile:
        """Open the file; every run has one."""
        return cls(folder, step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line, visible to other processes at once."""
        # JSON has no NaN and no infinity.
        line = {n: _shortened(value) if math.isfinite(value) else None for n, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | line, allow_nan=False) + "\n")
        self._file.flush()

    def log_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Do nothing: bad rows have their own file."""

    def log_generations(self, step: int, generations: Sequence[Generation]) -> None:
        """Do nothing: generations have their own file."""

    def flush(self) -> None:
        """Push the file to a remote run folder."""
        self._folder.push(METRICS_FILE)

    def close(self) -> None:
        """Close and push the file."""
        self._file.close()
        self.flush()


def _shortened(value: float) -> float:
    """Keep 12 digits, of a learning rate of 1e-9 too."""
    return value if isinstance(value, int) else float(f"{value:.12g}")


def logged_kinds(folder: RunFolder) -> set[tuple[int, str]]:
    """Return the steps that an open file has lines of, each with `train` or `eval`.

    The line about a restart names the step that it follows, and is none of that step's lines.
    """
    lines = [line for line in read_jsonl(folder.path / METRICS_FILE, is_metrics_line) if RESTARTS not in line]
    return {(line["step"], name.partition("/")[0]) for line in lines for name in line if "/" in name}


def last_metrics(folder: RunFolder) -> dict[str, float]:
    """Return the latest finite value of every metric of a run."""
    folder.pull(METRICS_FILE)
    latest: dict[str, float] = {}
    for line in read_jsonl(folder.path / METRICS_FILE, is_metrics_line):
        latest.update({name: value for name, value in line.items() if value is not None})
    return latest


def _latest(lines: Sequence[Mapping[str, float]], name: str) -> float:
    return next((line[name] for line in reversed(lines) if name in line), 0)
