"""Compare a sweep with the same runs as single commands: what trials share in one session is their starts.

    python benchmarks/shared_sweep.py [--trials N] [--steps N] [--json]

The recipe is that of the quickstart's sweep, without early stopping and without evaluations on the way. (a) is one
`orpo-ray tune`, one trial at a time; (b) is an `orpo-ray train` for each of its trials, one after another, with the
recipe that (a) left in the trial's folder. Both train every weight, so that no trials share a model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import provenance

from orpo_ray.tracking.jsonl import read_jsonl

RECIPE = Path(__file__).parents[1] / "recipes" / "sweep-beta-lr-quickstart.yaml"


def timed(folder: Path, *arguments: str) -> float:
    """Run a command with a Ray of its own. Returns its seconds."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started = time.perf_counter()
    command = [sys.executable, "-m", "orpo_ray", *arguments]
    subprocess.run(command, cwd=folder, env=own, check=True, capture_output=True)
    return time.perf_counter() - started


def losses(run: Path) -> list[float]:
    """Read the training losses of a run."""
    return [line["train/loss"] for line in read_jsonl(run / "metrics.jsonl") if "train/loss" in line]


def compare(trials: int, steps: int) -> dict[str, float]:
    """Run (a) and then (b)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = [f"optim.max_steps={steps}", "eval.every_steps=1000000", "checkpoint.every_steps=1000000"]
        search = [f"tune.num_trials={trials}", "tune.scheduler=none", "tune.max_concurrent=1", "name=sweep"]
        together = timed(folder, "tune", str(RECIPE), *options, *search)
        alone, largest = 0.0, 0.0
        for trial in sorted((folder / "runs/sweep/trials").iterdir()):
            run = f"single-{trial.name}"
            alone += timed(folder, "train", str(trial / "recipe.yaml"), f"name={run}", "checkpoint.storage=runs")
            pairs = zip(losses(trial), losses(folder / "runs" / run), strict=True)
            largest = max(largest, *(abs(one - other) for one, other in pairs))
    return {
        "trials": trials,
        "steps": steps,
        "sweep_seconds": together,
        "single_commands_seconds": alone,
        "time_ratio": together / alone,
        "largest_loss_difference": largest,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    row = {name: round(value, 6) for name, value in compare(arguments.trials, arguments.steps).items()}
    result = provenance() | row
    print(json.dumps(result) if arguments.json else "\n".join(f"{name:32} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
