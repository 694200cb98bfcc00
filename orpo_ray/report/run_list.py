"""`orpo-ray runs`: the runs in a folder, with their states and main figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.report.run_data import State, read_run
from orpo_ray.storage.run_folder import METRICS_FILE, RECIPE_FILE, TRIALS, RunFolder

DEPTH = 3
"""Folders in folders that are searched: the name of a run may contain slashes."""
FIGURES = ("train/loss", "eval/rewards/accuracies", "eval/grounding_gap", "eval/rewards/margins")
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


def print_runs(runs: list[ListedRun], console: Console) -> None:
    """Print the runs as a table."""
    table = Table(box=None, padding=(0, 2))
    for column in ("run", "state", "model", "steps", "loss", "accuracy", "grounding gap", "margin"):
        table.add_column(column, justify="left" if column in ("run", "state", "model") else "right")
    for run in runs:
        figures = [f"{run.figures[name]:.4f}" if name in run.figures else "-" for name in FIGURES]
        state = f"[{_COLORS[run.state]}]{run.state}[/]"
        table.add_row(escape(run.path), state, escape(run.model), f"{run.step:,}", *figures)
    console.print(table)
