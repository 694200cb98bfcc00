"""Progress through rows: a bar on a terminal, a line now and then elsewhere, such as in the log of a job."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0


class RowProgress:
    """Context manager that shows how many rows of a task are done.

    Args:
        console: where to print.
        title: what is done, such as `reading train`.
        total: number of rows.
    """

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total, self._done = console, title, total, 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(title, total=total)
        self._last = time.monotonic()

    def __enter__(self) -> RowProgress:
        if self._console.is_terminal:
            self._bar.start()
        else:
            self._print()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def advance(self, rows: int = 1) -> None:
        """Count rows as done."""
        self._done += rows
        if self._console.is_terminal:
            self._bar.advance(self._task, rows)
        elif self._done < self._total and time.monotonic() - self._last >= LINE_SECONDS:
            self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        text = f"{self._title}  {self._done:,}/{self._total:,} rows"
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)
