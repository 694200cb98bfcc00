"""A sweep on the console: one live table on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orpo_ray.storage.run_folder import METRICS_FILE, TRIALS, RunFolder
from orpo_ray.sweep.board import Board
from orpo_ray.sweep.record import STEP, Trial
from orpo_ray.sweep.space import Space, short_keys

REFRESH_SECONDS = 1.0
OVERDUE = 0.1
"""Assume that a trial that has taken longer than the mean needs this fraction of the mean time more."""
ROWS = 20
"""Of the live table."""
TAIL_BYTES = 1 << 14
"""Of a trial's metrics file, which hold its last line."""
COLORS = {"running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow"}


@dataclass(frozen=True)
class Progress:
    """How far a running trial is."""

    step: int
    pairs_per_second: float | None


class SweepDisplay:
    """Context manager that shows a sweep while its body runs.

    Args:
        board: of the sweep.
        space: of the search.
        run_uri: folder of the sweep.
        console: where to print.
    """

    def __init__(self, board: Board, space: Space, run_uri: str, console: Console) -> None:
        self._board, self._space, self._run_uri, self._console = board, space, run_uri, console
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> SweepDisplay:
        if self._console.is_terminal:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def began(self, number: int) -> None:
        """Say that a trial begins, and with what."""
        trial = self._board.record.trial(number)
        fields = zip(short_keys(self._space.keys), self._space.labels(trial.params), strict=True)
        values = "  ".join(f"{name} {value}" for name, value in fields)
        if trial.parent is not None:
            values += f"  from {trial.parent:04d} at step {trial.parent_step:,}"
        self._line(f"{trial.name}  {'goes on' if trial.history else 'begins'}: {values}")

    def evaluated(self, number: int) -> None:
        """Say what a trial has reached."""
        trial, metric = self._board.record.trial(number), self._board.record.tune.metric
        value = trial.value(metric)
        if value is not None:
            self._line(f"{trial.name}  step {trial.step:,}  {metric} {value:.4f}  {self._left()}")

    def ended(self, number: int) -> None:
        """Say how a trial ended."""
        trial = self._board.record.trial(number)
        self._line(f"{trial.name}  {trial.state}{': ' + trial.error if trial.error else ''}  {self._left()}")

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text.rstrip(), highlight=False, soft_wrap=True, markup=False)

    def _refresh(self) -> None:
        with Live(self._view(), console=self._console, transient=True, auto_refresh=False) as live:
            while not self._end.wait(REFRESH_SECONDS):
                live.update(self._view(), refresh=True)

    def _view(self) -> Group:
        with self._board.lock:
            return Group(self._table(), Text(self._left()))

    def _table(self) -> Table:
        record = self._board.record
        table = Table(box=None, padding=(0, 1))
        for name in ("trial", *short_keys(self._space.keys), "step", record.tune.metric, "pairs/s", "state", "left"):
            table.add_column(escape(name), justify="left" if name in ("trial", "state") else "right")
        running = [trial for trial in record.trials if trial.state == "running"]
        over = [trial for trial in record.ranked() if trial.state != "running"]
        for trial in [*running, *over][:ROWS]:
            progress = self._progress(trial) if trial.state == "running" else Progress(trial.step, None)
            value = trial.value(record.tune.metric)
            table.add_row(
                trial.name,
                *map(escape, self._space.labels(trial.params)),
                f"{progress.step:,}/{record.num_steps:,}",
                "-" if value is None else f"{value:.4f}",
                "-" if progress.pairs_per_second is None else f"{progress.pairs_per_second:.1f}",
                trial.state,
                self._left_of(trial, progress.step),
                style=COLORS.get(trial.state),
            )
        return table

    def _progress(self, trial: Trial) -> Progress:
        """Read how far a trial is from its metrics file, where the folder is on a disk that this process sees."""
        folder = RunFolder(f"{self._run_uri}/{TRIALS}/{trial.name}") if "://" not in self._run_uri else None
        line = {} if folder is None else _last_line(folder)
        rate = line.get("train/pairs_per_second")
        return Progress(max(int(line.get(STEP, 0)), trial.step), None if rate is None else float(rate))

    def _left_of(self, trial: Trial, step: int) -> str:
        done, seconds = step - trial.parent_step, trial.seconds
        if trial.state != "running" or done <= 0 or seconds <= 0:
            return ""
        return duration(seconds / done * max(0, self._board.record.num_steps - step))

    def _left(self) -> str:
        """Say how many trials are over, the time that is left, and the money."""
        board, record = self._board, self._board.record
        over = [trial for trial in record.trials if trial.is_over]
        total = max(board.num_trials, len(record.trials))
        text = f"{len(over)} of {total} trials over"
        if over:
            mean = sum(trial.seconds for trial in over) / len(over)
            begun = [max(mean - trial.seconds, OVERDUE * mean) for trial in record.trials if not trial.is_over]
            left = (sum(begun) + (total - len(record.trials)) * mean) / board.together
            if record.tune.max_hours is not None:
                left = min(left, max(0.0, 3600 * record.tune.max_hours - board.seconds))
            text += f", about {duration(left)} left"
        if record.price_per_hour:
            budget = f" of ${record.tune.max_cost:,.2f}" if record.tune.max_cost is not None else ""
            text += f", ${record.cost:,.2f}{budget} spent"
        return text


def duration(seconds: float) -> str:
    """Format a time: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _last_line(folder: RunFolder) -> dict[str, Any]:
    """Return the last whole line of a run's metrics that is of a training step; empty if there is none."""
    path = folder.path / METRICS_FILE
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "train/pairs_per_second" in found:
            return found
    return {}
