"""Faults of all kinds, drawn from a seed, in one run."""

from __future__ import annotations

import io
import json
import os
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import OrpoRayError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.training.checkpoint_choice import checkpoint_names
from orpo_ray.training.launch import launch_training
from support.clusters import add_node, drain, lose_node, processes
from support.runs import last_step, wait_until
from support.tiny_runs import losses, tiny_recipe

WITHIN_A_RUN = ("worker", "status", "torn")
ALL = (*WITHIN_A_RUN, "driver", "node", "added", "notice")
MAX_NODES = 2  # beside the head, which holds the driver
NOTICE_S = 15  # from the notice to the end of the node
LIMIT_S = 900  # for one recovery, while other tests run
PER_STEP = 4


def storm_recipe(folder: Path, name: str, data: Path, epochs: int, adapter: str | None, **sections: Any) -> Recipe:
    """Return a recipe for all rows of a file, by an adapter of `support.slow_rows` if one is given."""
    return tiny_recipe(
        folder,
        name,
        data={
            "train": str(data),
            "format": "auto" if adapter is None else f"support.slow_rows:{adapter}",
            "shuffle_window": 16,
            "max_bad_fraction": 0.2,
        },
        # With the usual epsilon, the training of this model amplifies rounding a million times in 300 steps.
        optim={"epochs": epochs, "max_steps": None, "pairs_per_step": PER_STEP, "adam_epsilon": 1e-4},
        **sections,
    )


def check_every_pair_once(recipe: Recipe, calm: Recipe, num_rows: int, reasons: dict[str, str]) -> None:
    """Compare a run with one that had no faults.

    Args:
        recipe: of the run.
        calm: of the other run.
        num_rows: of the data, good and bad.
        reasons: source -> reason of each bad row.
    """
    folder, epochs = Path(recipe.run_uri), int(recipe.optim.epochs)
    curve, num_steps = losses(folder), epochs * num_rows // PER_STEP
    assert sorted(curve) == list(range(1, num_steps + 1))
    position = json.loads(max(folder.glob("checkpoint_*/position.json")).read_text())
    expected = (num_steps, epochs * num_rows, epochs * len(reasons))
    assert (position["step"], position["seen"], position["bad"]) == expected
    found = read_jsonl(folder / "bad_rows.jsonl")
    assert {row["source"]: row["reason"] for row in found} == reasons
    assert len(found) == len(reasons)
    assert curve == pytest.approx(losses(Path(calm.run_uri)), abs=1e-4)


class Started(Protocol):
    """A run, as a process or in a thread of this one."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self) -> Any: ...

    def communicate(self) -> tuple[Any, str]: ...


class InThread:
    """A run in a thread of this process."""

    def __init__(self, recipe: Recipe) -> None:
        self.returncode: int | None = None
        self._recipe, self._said = recipe, io.StringIO()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        code = 1
        try:
            launch_training(self._recipe, Console(file=self._said))
            code = 0
        except OrpoRayError as error:
            self._said.write(str(error))
        finally:
            self.returncode = code

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        """Leave the run to its end, which is near."""

    def wait(self) -> None:
        self._thread.join()

    def communicate(self) -> tuple[None, str]:
        return None, self._said.getvalue()


class Storm:
    """A run of `orpo-ray train` and what befalls it. Always end it with `stop`.

    Args:
        recipe: of the run.
        start: starts the run.
        seed: of the faults.
        kinds: of faults.
        cluster: a head, and as many other nodes as the storm may use; None without faults of nodes.
    """

    def __init__(
        self, recipe: Recipe, start: Callable[[], Started], seed: int, kinds: Sequence[str] = ALL, cluster: Any = None
    ) -> None:
        self._recipe, self._start, self._kinds, self._cluster = recipe, start, kinds, cluster
        self._random = random.Random(seed)
        self._nodes: list[Any] = [] if cluster is None else list(cluster.worker_nodes)
        self._going: list[threading.Timer] = []
        self._process = start()
        self.planted: list[tuple[int, str]] = []
        """Step and kind of each fault."""

    def rage(self, num_faults: int, num_steps: int) -> None:
        """Plant faults, each after a step that is drawn, and wait for the end of the run."""
        steps = sorted(self._random.randint(3, num_steps - 10) for _ in range(num_faults))
        # Each kind as often as the others, in an order that is drawn.
        kinds = [self._kinds[number % len(self._kinds)] for number in range(num_faults)]
        self._random.shuffle(kinds)
        for step, kind in zip(steps, kinds, strict=True):
            self._wait_for(step)
            self.planted.append((last_step(Path(self._recipe.run_uri)), kind))
            getattr(self, f"_{kind}")()
        wait_until(lambda: self._process.poll() is not None, "the end of the run", 3 * LIMIT_S)
        assert self._process.returncode == 0, f"{self.planted}\n{self._said()}"

    def stop(self) -> None:
        """End the run, and take away the nodes that were announced to go."""
        self._process.kill()
        self._process.wait()
        for timer in self._going:
            timer.cancel()
            timer.join()

    def _wait_for(self, step: int) -> None:
        def is_there() -> bool:
            assert self._process.poll() in (None, 0), f"{self.planted}\n{self._said()}"
            return last_step(Path(self._recipe.run_uri)) >= step

        wait_until(is_there, f"step {step} after {self.planted}", LIMIT_S)

    def _said(self) -> str:
        return self._process.communicate()[1]

    def _kill_one(self, role: str) -> None:
        found: list[psutil.Process] = []

        def is_running() -> bool:
            found[:] = processes(role)
            return bool(found) or self._process.poll() is not None

        wait_until(is_running, f"a {role}", LIMIT_S)  # there may be none during a restart
        with suppress(psutil.NoSuchProcess):
            for process in self._random.sample(found, min(1, len(found))):
                process.kill()

    def _worker(self) -> None:
        self._kill_one("RayTrainWorker")

    def _status(self) -> None:
        self._kill_one("RunStatus")

    def _driver(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._process = self._start()

    def _torn(self) -> None:
        """Cut the newest checkpoint, which is read when a worker is lost."""
        run = RunFolder(self._recipe.run_uri)
        for name in checkpoint_names(run)[:1]:
            with suppress(FileNotFoundError):  # it may be deleted now
                largest = max((run.path / name).rglob("*"), key=lambda path: path.stat().st_size)
                os.truncate(largest, largest.stat().st_size // 2)
        self._worker()

    def _node(self) -> None:
        if not self._nodes:
            return self._added()
        node = self._random.choice(self._nodes)
        self._nodes.remove(node)
        lose_node(self._cluster, node)

    def _notice(self) -> None:
        if not self._nodes:
            return self._added()
        node = self._random.choice(self._nodes)
        self._nodes.remove(node)
        drain(self._cluster, node, NOTICE_S)
        self._going.append(threading.Timer(NOTICE_S, lose_node, (self._cluster, node)))
        self._going[-1].start()

    def _added(self) -> None:
        if len(self._nodes) < MAX_NODES:
            self._nodes.append(add_node(self._cluster))
        else:
            self._node()
