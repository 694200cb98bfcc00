"""Count the calls to actors in runs of `orpo-ray train`, by number of workers.

    python benchmarks/control_calls.py [--workers 1,2] [--steps 20,120] [--json]

Each run trains the tiny SmolVLM on easy-vqa, one pair per worker and step, on a Ray on this machine, whose record of
tasks has every call to an actor by name. Two runs that differ only in their number of steps tell what a step adds from
what a start and an end cost: `per_step` is the difference of their calls to that of their steps. The calls of `POLLS`
are made by time, also while a run starts and ends: for them, see `calls` of the longer run and its `seconds`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from typing import Any

from machine import provenance

from orpo_ray.config.load import parse_recipe

# The calls that docs/scaling.md lists, by the names that Ray gives them.
CALLS = {
    "share of a step": "StepFeed.take",
    "status, by rank 0": "RunStatus.update",
    "status, by the driver": "RunStatus.state",
    "poll, by Ray Train's controller": "RayTrainWorker.poll_status",
}
POLLS = ("status, by the driver", "poll, by Ray Train's controller")
TASK = "task::"  # how Ray's timeline marks a call, among parts of calls
REPORTED_S = 3.0  # processes send their record of tasks once a second


def per_step(short: Counter[str], long: Counter[str], steps: int) -> dict[str, float]:
    """Return how many calls of each kind a step adds, from those of two runs that differ by this many steps."""
    return {kind: (long[name] - short[name]) / steps for kind, name in CALLS.items() if kind not in POLLS}


def calls_so_far() -> Counter[str]:
    """Return the number of calls to actors and tasks in this Ray, by name."""
    import ray

    time.sleep(REPORTED_S)
    names = (event["cat"].removeprefix(TASK) for event in ray.timeline() if event["cat"].startswith(TASK))
    return Counter(names)


def run(workers: int, steps: int, folder: str) -> tuple[Counter[str], float]:
    """Train, and return the run's calls by name, and its seconds from start to end."""
    from rich.console import Console

    from orpo_ray.training.launch import launch_training

    name = f"{workers}-workers-{steps}-steps"
    recipe = parse_recipe(
        {"name": name, "model": {"id": "orpo-ray/tiny-smolvlm"}, "data": {"train": "easy-vqa:train"},
         "optim": {"pairs_per_step": workers, "max_steps": steps}, "scaling": {"num_workers": workers},
         "checkpoint": {"storage": folder, "every_steps": 10 * steps}, "eval": {"grounding": False}}
    )  # fmt: skip
    before = calls_so_far()
    started = time.perf_counter()
    launch_training(recipe, Console(stderr=True))
    seconds = time.perf_counter() - started
    return calls_so_far() - before, seconds


def measure(workers: int, steps: tuple[int, int], folder: str) -> dict[str, Any]:
    """Compare a short and a long run."""
    (short, _), (long, seconds) = (run(workers, each, folder) for each in steps)
    return {
        "workers": workers,
        "calls": {kind: long[name] for kind, name in CALLS.items()},
        "per_step": per_step(short, long, steps[1] - steps[0]),
        "seconds": round(seconds, 1),
        "others": {name: count for name, count in long.items() if name not in CALLS.values()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--steps", default="20,120", help="of the shorter and the longer run")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    short, long = map(int, arguments.steps.split(","))
    import ray

    from orpo_ray.ray_cluster.start import start_ray

    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(workers, (short, long), folder) for workers in map(int, arguments.workers.split(","))]
    ray.shutdown()
    if arguments.json:
        print(json.dumps(provenance() | {"steps": [short, long], "rows": rows}))
        return
    for row in rows:
        print("\n".join(f"{name:12} {value}" for name, value in row.items()))
    print("\n".join(f"{name:12} {value}" for name, value in provenance().items()))


if __name__ == "__main__":
    main()
