"""Metrics and bad rows of a run to its folder, and to Weights & Biases when asked for. Rank 0 only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.extras import require
from orpo_ray.storage.run_folder import BAD_ROWS_FILE, METRICS_FILE, RunFolder


class Tracker:
    """Appends to `metrics.jsonl` and `bad_rows.jsonl`, and mirrors metrics to W&B.

    Opened at the step that a run starts or resumes from: lines of later steps, written by an attempt that died
    before its next checkpoint, are taken back, so that every step stands there once.
    """

    def __init__(self, recipe: Recipe, step: int) -> None:
        self._folder = RunFolder(recipe.run_uri)
        self._folder.make()
        self._folder.pull(METRICS_FILE, BAD_ROWS_FILE)
        self.run_dir = self._folder.path
        _keep(self.run_dir / METRICS_FILE, lambda line: line["step"] <= step)
        self._metrics = (self.run_dir / METRICS_FILE).open("a", encoding="utf-8")
        # At the start of a run the file may hold what `data check` found; the run meets those rows again.
        _keep(self.run_dir / BAD_ROWS_FILE, lambda line: step > 0)
        # A bad row comes up once an epoch, and again after a resume: it is written once.
        self._bad_sources = {line["source"] for line in read_jsonl(self.run_dir / BAD_ROWS_FILE)}
        self._wandb = _start_wandb(recipe, self.run_dir)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics (`train/...`, `eval/...`) for a step."""
        line = {"step": step} | {name: round(value, 10) for name, value in metrics.items()}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def log_bad_rows(self, rows: Iterable[BadRow]) -> None:
        """Write the bad rows that the file does not hold yet."""
        with (self.run_dir / BAD_ROWS_FILE).open("a", encoding="utf-8") as file:
            for row in rows:
                if row.source not in self._bad_sources:
                    self._bad_sources.add(row.source)
                    file.write(json.dumps(row.as_line(), ensure_ascii=False) + "\n")

    def push(self) -> None:
        """Bring what was written so far to a run folder in an object store."""
        self._folder.push(METRICS_FILE, BAD_ROWS_FILE)

    def close(self) -> None:
        """Flush everything; W&B uploads what is left."""
        self._metrics.close()
        self.push()
        if self._wandb is not None:
            self._wandb.finish()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file of ours; none if there is no file. A last line cut off by a kill is left out."""
    if not path.exists():
        return []
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in (*lines, last) if line]
    except json.JSONDecodeError:
        return [json.loads(line) for line in lines if line]


def write_bad_rows(folder: RunFolder, rows: Iterable[BadRow]) -> None:
    """Write `bad_rows.jsonl` before a run is; of one that is there, what it met stands and nothing is touched."""
    if not folder.has(METRICS_FILE):
        lines = (json.dumps(row.as_line(), ensure_ascii=False) + "\n" for row in rows)
        (folder.path / BAD_ROWS_FILE).write_text("".join(lines), encoding="utf-8")
        folder.push(BAD_ROWS_FILE)


def last_metrics(folder: RunFolder) -> dict[str, float]:
    """The latest value of every metric of a run."""
    folder.pull(METRICS_FILE)
    latest: dict[str, float] = {}
    for line in read_jsonl(folder.path / METRICS_FILE):
        latest.update(line)
    return latest


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of ours with the wanted lines only, and without a last line that a kill cut off."""
    if path.exists():
        lines = read_jsonl(path)
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in lines if wanted(line)), encoding="utf-8")
        scratch.replace(path)


def _start_wandb(recipe: Recipe, run_dir: Path) -> Any:
    section = recipe.tracking.wandb
    enabled = bool(os.environ.get("WANDB_API_KEY")) if section.enabled == "auto" else section.enabled
    if not enabled:
        return None
    require("wandb", "tracking.wandb.enabled")
    import wandb

    # The id makes a resumed run continue the same curves; the key stays in the environment.
    return wandb.init(
        project=section.project,
        entity=section.entity,
        name=recipe.name,
        id=recipe.name.replace("/", "-"),
        resume="allow",
        mode=section.mode,
        dir=run_dir,
        config=recipe.model_dump(mode="json"),
        settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
    )
