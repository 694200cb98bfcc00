"""What a run folder says about its run, read without Ray, models or GPUs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pyarrow as pa

from orpo_ray.config.load import parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.evaluation.pair_scores import read_pair_scores
from orpo_ray.storage.lease import LEASE_FILE, holder_of
from orpo_ray.storage.run_folder import (
    BAD_ROWS_FILE,
    DATA_FILE,
    ENVIRONMENT_FILE,
    EVAL_PAIRS_FILE,
    EVAL_PAIRS_START_FILE,
    FINAL,
    GENERATIONS_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    SWEEP_FILE,
    SWEEP_PAGE,
    RunFolder,
    not_a_run,
)
from orpo_ray.tracking.bad_rows_file import is_bad_rows_line
from orpo_ray.tracking.generations import is_generations_line, lines_by_pair
from orpo_ray.tracking.jsonl import damaged_lines, read_whole_lines
from orpo_ray.tracking.metrics_file import is_metrics_line

if TYPE_CHECKING:  # it imports torch, which `orpo-ray runs` does without
    from orpo_ray.evaluation.token_scores import Tokens

State = Literal["finished", "running", "stopped", "not started"]
_RECENT_SECONDS = 30.0
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class RunData:
    """A run."""

    folder: RunFolder
    recipe: Recipe
    state: State
    lines: list[dict[str, Any]]
    """Of `metrics.jsonl`."""
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    """Versions and hardware that the run began with."""
    data_files: list[tuple[str, str]] = field(default_factory=list)
    """Training files that the run began with, and digests of their content."""
    pairs: pa.Table | None = None
    """Scores of the held-out pairs by the final model."""
    start_pairs: pa.Table | None = None
    """The same by the model before the first step."""
    tokens: tuple[str, dict[int, dict[str, Tokens]]] = ("", {})
    """Digest of the held-out data, and sample index -> log-probs of tokens."""
    generations: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    """Sample index -> step -> line of `generations.jsonl`."""
    problems: list[UserError] = field(default_factory=list)
    """Damaged files, which are left out in whole or in part."""
    label: str = ""
    """What to call the run instead of the recipe's name."""

    @property
    def name(self) -> str:
        """What to call the run."""
        return self.label or self.recipe.name

    @property
    def latest(self) -> dict[str, float]:
        """The latest finite value of every metric."""
        found: dict[str, float] = {}
        for line in self.lines:
            found |= {name: value for name, value in line.items() if value is not None}
        return found

    @property
    def step(self) -> int:
        """The latest step."""
        return max((int(line["step"]) for line in self.lines), default=0)

    @property
    def bad_reasons(self) -> dict[str, int]:
        """Reason -> number of bad rows, the most frequent first."""
        return dict(Counter(str(row.get("reason")) for row in self.bad_rows).most_common())

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and finite values of a metric."""
        found = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]


def read_run(folder: RunFolder, with_pairs: bool = True) -> RunData:
    """Read a run folder.

    Args:
        folder: of the run.
        with_pairs: whether to read bad rows and scores of pairs too.

    Raises:
        UserError: the folder holds no run, or its recipe cannot be read.
    """
    if not folder.has(RECIPE_FILE) and folder.has(SWEEP_FILE):
        fix = f"open its {SWEEP_PAGE}, or give the folders of trials, which are in trials/"
        raise UserError("this is a sweep, not a run", field=folder.uri, fix=fix)
    if not folder.has(RECIPE_FILE):
        raise not_a_run(folder)
    folder.pull(RECIPE_FILE)
    recipe = parse_recipe(read_mapping(folder.path / RECIPE_FILE), source=f"{folder.uri}/{RECIPE_FILE}")
    problems: list[UserError] = []
    lines = _read_lines(folder, METRICS_FILE, is_metrics_line, problems)
    state = state_of(folder, bool(lines))
    if not with_pairs:
        return RunData(folder, recipe, state, lines, problems=problems)
    from orpo_ray.evaluation.token_scores import read_tokens

    no_tokens: tuple[str, dict[int, dict[str, Tokens]]] = ("", {})
    return RunData(
        folder,
        recipe,
        state,
        lines,
        bad_rows=_read_lines(folder, BAD_ROWS_FILE, is_bad_rows_line, problems),
        environment=_unless_damaged(lambda: _read_environment(folder), {}, problems),
        data_files=_unless_damaged(lambda: _read_data_files(folder), [], problems),
        pairs=_unless_damaged(lambda: read_pair_scores(folder, EVAL_PAIRS_FILE), None, problems),
        start_pairs=_unless_damaged(lambda: read_pair_scores(folder, EVAL_PAIRS_START_FILE), None, problems),
        tokens=_unless_damaged(lambda: read_tokens(folder), no_tokens, problems),
        generations=lines_by_pair(_read_lines(folder, GENERATIONS_FILE, is_generations_line, problems)),
        problems=problems,
    )


def state_of(folder: RunFolder, has_steps: bool) -> State:
    """Say what has become of a run. One on another machine runs if it renewed its lease in the last seconds."""
    if folder.has_model(FINAL):
        return "finished"
    holder = holder_of(folder)
    if holder is not None and holder.is_local and holder.is_alive:
        return "running"
    if holder is not None and not holder.is_local and not folder.is_remote:
        age = time.time() - (folder.path / LEASE_FILE).stat().st_mtime
        if age < _RECENT_SECONDS:
            return "running"
    return "stopped" if has_steps else "not started"


def _unless_damaged(read: Callable[[], _Read], otherwise: _Read, problems: list[UserError]) -> _Read:
    """Read a file that a report can do without; add an error to the problems instead of raising it."""
    try:
        return read()
    except UserError as error:
        problems.append(error)
        return otherwise


def _read_lines(
    folder: RunFolder, name: str, is_whole: Callable[[Mapping[str, Any]], bool], problems: list[UserError]
) -> list[dict[str, Any]]:
    """Read a file of JSON Lines without the damaged ones, which become a problem."""
    folder.pull(name)
    lines, damaged = read_whole_lines(folder.path / name, is_whole)
    if damaged:
        problems.append(damaged_lines(f"{folder.uri}/{name}", damaged))
    return lines


def _read_environment(folder: RunFolder) -> dict[str, str]:
    found = _read_json(folder, ENVIRONMENT_FILE, dict)
    return {str(name): str(value) for name, value in (found or {}).items()}


def _read_data_files(folder: RunFolder) -> list[tuple[str, str]]:
    found = _read_json(folder, DATA_FILE, list) or []
    return [(str(each[0]), str(each[1])) for each in found if isinstance(each, list) and len(each) == 2]


def _read_json(folder: RunFolder, name: str, kind: type[_Read]) -> _Read | None:
    """Read a JSON file; None if it does not exist. Raises UserError."""
    folder.pull(name)
    path = folder.path / name
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise UserError("the file is damaged", field=f"{folder.uri}/{name}", fix="delete the file")
    return found
