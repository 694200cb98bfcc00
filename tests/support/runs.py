"""Run recipes on a real Ray cluster, and wait for their progress."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.training.launch import RunSummary, launch_training


def run(recipe: Recipe) -> RunSummary:
    return launch_training(recipe, Console(file=io.StringIO()))


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_jsonl(run_dir / "metrics.jsonl")), default=0)
