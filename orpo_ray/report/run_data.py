"""What a run folder says about its run, read without Ray, models or GPUs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from orpo_ray.config.load import parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.evaluation.pair_scores import read_pair_scores
from orpo_ray.storage.lease import LEASE_FILE, holder_of
from orpo_ray.storage.run_folder import (
    BAD_ROWS_FILE,
    ENVIRONMENT_FILE,
    EVAL_PAIRS_FILE,
    EVAL_PAIRS_START_FILE,
    FINAL,
    METRICS_FILE,
    RECIPE_FILE,
    SWEEP_FILE,
    SWEEP_PAGE,
    RunFolder,
)
from orpo_ray.tracking.generations import read_generations
from orpo_ray.tracking.jsonl import read_jsonl

State = Literal["finished", "running", "stopped", "not started"]
_RECENT_SECONDS = 30.0


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
    pairs: pa.Table | None = None
    """Scores of the held-out pairs by the final model."""
    start_pairs: pa.Table | None = None
    """The same by the model before the first step."""
    generations: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    """Sample index -> step -> line of `generations.jsonl`."""
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
        UserError: the folder holds no run.
    """
    if not folder.has(RECIPE_FILE) and folder.has(SWEEP_FILE):
        fix = f"open its {SWEEP_PAGE}, or give the folders of trials, which are in trials/"
        raise UserError("this is a sweep, not a run", field=folder.uri, fix=fix)
    if not folder.has(RECIPE_FILE):
        raise UserError(f"no run is here (no {RECIPE_FILE})", field=folder.uri, fix="give the folder of a run")
    folder.pull(RECIPE_FILE, METRICS_FILE)
    recipe = parse_recipe(read_mapping(folder.path / RECIPE_FILE), source=f"{folder.uri}/{RECIPE_FILE}")
    lines = read_jsonl(folder.path / METRICS_FILE)
    state = state_of(folder, bool(lines))
    if not with_pairs:
        return RunData(folder, recipe, state, lines)
    folder.pull(BAD_ROWS_FILE, ENVIRONMENT_FILE)
    return RunData(
        folder,
        recipe,
        state,
        lines,
        read_jsonl(folder.path / BAD_ROWS_FILE),
        _read_environment(folder),
        read_pair_scores(folder, EVAL_PAIRS_FILE),
        read_pair_scores(folder, EVAL_PAIRS_START_FILE),
        read_generations(folder),
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


def _read_environment(folder: RunFolder) -> dict[str, str]:
    path = folder.path / ENVIRONMENT_FILE
    if not path.is_file():
        return {}
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {str(name): str(value) for name, value in found.items()}
