"""`orpo-ray runs`: the runs in a folder, with their states and main figures."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.report.run_data import State, read_run
from orpo_ray.storage.run_folder import METRICS_FILE, RECIPE_FILE, TRIALS, RunFolder

DEPTH = 3
"""Folders in folders that are searched: the name of a run may contain slashes."""
FIGURES = ("train/loss", "eval/rewards/accuracies", "eval/grounding_gap", "eval/rewards/margins")
MODEL_WIDTH = 12
"""Characters of a model's name that are always shown."""
UNLIMITED = 100_000  # characters of a line
_COLORS: Mapping[State, str] = {"finished": "green", "running": "cyan", "stopped": "yellow", "not started": "default"}


@dataclass(frozen=True)
class ListedRun:
    """A run."""

    path: str
    state: State
    model: str
    step: int
    figures: dict[str, float]
    """The latest of `FIGURES` that the run has."""


def list_runs(folder: str) -> list[ListedRun]:
    """List the runs in a folder on this machine, the one that was written to last first.

    Raises:
        UserError: the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError("no such folder", field="FOLDER", value=folder, fix="give the folder of runs (default: runs)")
    found = sorted(_run_folders(root, DEPTH), key=_written, reverse=True)
    return [run for path in found if (run := _listed(path)) is not None]


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / RECIPE_FILE).is_file():
        yield folder
        folder = folder / TRIALS  # of a sweep
        if not folder.is_dir():
            return
    if depth:
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.is_symlink():
                yield from _run_folders(below, depth - 1)


def _written(folder: Path) -> float:
    files = [folder / name for name in (METRICS_FILE, RECIPE_FILE)]
    return max(file.stat().st_mtime for file in files if file.exists())


def _listed(path: Path) -> ListedRun | None:
    """Read a run; None if its recipe cannot be read, as of another version."""
    try:
        run = read_run(RunFolder(str(path)), with_pairs=False)
    except OrpoRayError:
        return None
    latest = run.latest
    figures = {name: latest[name] for name in FIGURES if name in latest}
    return ListedRun(str(path), run.state, run.recipe.model.id, run.step, figures)


def print_runs(runs: list[ListedRun], folder: str, console: Console) -> None:
    """Print the runs of a folder as a table, with names relative to the folder.

    Where a terminal is too narrow for the table, models are cut; names and states never are.
    """
    if not runs:
        console.print(
            f"there are no runs in {folder} that this version can read", highlight=False, soft_wrap=True, markup=False
        )
        return
    width = _width(table := _table(runs, folder, None))
    if console.is_terminal and width > console.width:
        widest = max(len(run.model) for run in runs)
        width = _width(table := _table(runs, folder, max(MODEL_WIDTH, widest - (width - console.width))))
    table.width = width  # or the table has the console's
    console.print(table, crop=False, soft_wrap=True)


def _table(runs: list[ListedRun], folder: str, model_width: int | None) -> Table:
    table = Table(box=None, padding=(0, 2))
    for column in ("run", "state", "model", "steps", "loss", "accuracy", "grounding gap", "margin"):
        is_text = column in ("run", "state", "model")
        width = model_width if column == "model" else None
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True, max_width=width)
    for run in runs:
        figures = [f"{run.figures[name]:.4f}" if name in run.figures else "-" for name in FIGURES]
        state = f"[{_COLORS[run.state]}]{run.state}[/]"
        name = os.path.relpath(run.path, folder)
        name = run.path if name == "." else name
        table.add_row(escape(name), state, escape(run.model), f"{run.step:,}", *figures)
    return table


def _width(table: Table) -> int:
    """Return the characters of a line in which nothing is cut."""
    unlimited = Console(width=UNLIMITED, file=io.StringIO())
    return Measurement.get(unlimited, unlimited.options, table).maximum
