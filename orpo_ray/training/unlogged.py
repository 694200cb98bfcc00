"""What a run has logged since its last checkpoint, for a checkpoint that a worker saves without rank 0.

Rank 0 logs for all workers. If it is lost, the lines of the last steps may be lost with it: not yet written, or not yet
pushed to a remote run folder. So every worker keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.tracking.metrics_file import logged_kinds
from orpo_ray.tracking.trackers import MultiLogger

LOG_FILE = "log.json"
"""In the checkpoint."""


@dataclass(frozen=True)
class LogLine:
    """What was logged at once."""

    step: int
    metrics: dict[str, float]
    """With their prefix, `train/...` or `eval/...`."""
    bad: list[BadRow]
    """Bad rows of the step."""


def write_log(path: Path, lines: Sequence[LogLine]) -> None:
    """Write lines to a file of a checkpoint. Raises OSError."""
    path.write_text(json.dumps([asdict(line) for line in lines]))


def read_log(path: Path) -> list[LogLine]:
    """Return the lines in a checkpoint's file; none if it has no such file."""
    if not path.exists():
        return []
    return [
        LogLine(line["step"], line["metrics"], [BadRow(**row) for row in line["bad"]])
        for line in json.loads(path.read_text())
    ]


def log_missing(lines: Sequence[LogLine], tracker: MultiLogger) -> None:
    """Log those lines that the run's `metrics.jsonl` does not hold."""
    # The copy that the tracker writes to: in an object store, there may still be lines that it has dropped.
    logged = set() if tracker.folder is None else logged_kinds(tracker.folder)
    for line in lines:
        if any((line.step, name.partition("/")[0]) not in logged for name in line.metrics):
            tracker.log_bad_rows(line.bad)
            tracker.log(line.step, line.metrics)
