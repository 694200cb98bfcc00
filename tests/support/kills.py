"""Kill a worker of a run that trains in this process's Ray."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orpo_ray.config.recipe import Recipe
from support.runs import last_step, wait_until


@contextmanager
def one_worker_killed(recipe: Recipe, which: int = -1) -> Iterator[list[int]]:
    """Kill a worker of the run after step 8, with SIGKILL. Yields a list that then holds the steps that were done."""
    import ray
    from ray.util.state import list_actors

    done: list[int] = []
    address = (
        ray.get_runtime_context().gcs_address
    )  # by default, it would connect to the last cluster started on this machine

    def workers() -> list[Any]:
        alive = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
        return list_actors(address, filters=alive, detail=True)

    def kill() -> None:
        # Listed in advance, since listing takes longer than a step.
        wait_until((Path(recipe.run_uri) / "metrics.jsonl").exists, "the run's first file")
        wait_until(lambda: len(workers()) == recipe.scaling.num_workers, "the workers")
        pid = workers()[which].pid
        wait_until(lambda: last_step(Path(recipe.run_uri)) >= 8, "step 8")
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        done.append(last_step(Path(recipe.run_uri)))

    thread = threading.Thread(target=kill)
    thread.start()
    yield done
    thread.join()
    assert done
    assert (Path(recipe.run_uri) / "final").is_dir()
