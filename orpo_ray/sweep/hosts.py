"""The hosts of a sweep: which trials can have one, and which trials are in which."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.from_recipe import RunRows
from orpo_ray.storage.run_folder import TRIALS
from orpo_ray.sweep.host import Group, Host
from orpo_ray.sweep.record import Trial
from orpo_ray.sweep.space import Space, with_params
from orpo_ray.training.hosted_runs import HostedRuns
from orpo_ray.training.resources import Resources

LEAVE_SECONDS = 60.0
"""How long trials that have ended, or that were stopped, may take to leave: a step, and the end of an upload."""
ANSWER_SECONDS = 10.0
"""How long a free host may take to answer."""
# Ray starts processes for these, or DeepSpeed keeps state in the process.
OF_PROCESSES = ("scaling.", "deepspeed.")


def can_be_hosted(recipe: Recipe, space: Space, shares_rows: bool) -> bool:
    """Whether the trials of a sweep can follow each other in one process.

    Args:
        recipe: of the sweep.
        space: of the sweep.
        shares_rows: whether all trials read the same rows.
    """
    is_single = recipe.scaling.num_workers == 1 and recipe.deepspeed.zero_stage == 0
    return is_single and shares_rows and not any(key.startswith(OF_PROCESSES) for key in space.keys)


@dataclass
class _Running:
    host: Any
    """The actor."""
    name: str
    """Of the actor."""
    left: dict[int, str] = field(default_factory=dict)
    """Numbers and names of the trials that have not ended."""
    end: ray.ObjectRef | None = None
    """Of the group's end; None if the host is free."""
    left_at: float = 0.0
    """When the last trial was asked to leave."""


class Hosts:
    """Starts the hosts of a sweep, gives them trials, and ends them.

    Args:
        recipe: of the sweep, with what all trials have in common filled in.
        data: the rows of all trials.
        num_steps: of each trial.
        size: most trials of a host at a time.
        places: hosts at a time.
        resources: of each host.
    """

    def __init__(
        self, recipe: Recipe, data: RunRows, num_steps: int, size: int, places: int, resources: Resources
    ) -> None:
        self.size = size
        self._recipe, self._data, self._num_steps = recipe, data, num_steps
        self._places, self._resources = places, resources
        self._running: list[_Running] = []

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks and its search; nothing reads the copies

    def find_place(self) -> bool:
        """Free the hosts that all trials have left. Returns whether a host is free, or another one can start."""
        for each in list(self._running):
            if not each.left and each.end is not None:
                self._free(each)
        return len(self._running) < self._places or any(each.end is None for each in self._running)

    def start(self, trials: Sequence[Trial]) -> str:
        """Give trials to a host that is free, or to a new one. Returns its name."""
        while (found := next((each for each in self._running if each.end is None), None)) and not _is_sound(found):
            self._end(found)
        if found is None:
            found = self._new()
            self._running.append(found)
        found.left = {trial.number: trial.name for trial in trials}
        found.end = found.host.train.remote(self._group(trials))
        return found.name

    def leave(self, number: int) -> None:
        """Let a trial that has ended, or that was stopped, leave its host."""
        for each in self._running:
            if number in each.left:
                each.host.stop.remote(each.left.pop(number))
                each.left_at = time.monotonic()

    def end_free(self) -> None:
        """End the hosts that have no trial, so that others can have their GPUs."""
        for each in [each for each in self._running if each.end is None]:
            self._end(each)

    def close(self) -> None:
        """Let all trials leave, wait for their ends, and end the processes."""
        for number in [number for each in self._running for number in each.left]:
            self.leave(number)
        ends = [each.end for each in self._running if each.end is not None]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=LEAVE_SECONDS)
        for each in list(self._running):
            self._end(each)

    def _free(self, running: _Running) -> None:
        """Free a host that all trials have left. End one that can take no others, or that they do not leave."""
        if ray.wait([running.end], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(running.end):
                    running.end = None
                    return
            self._end(running)
        elif time.monotonic() - running.left_at > LEAVE_SECONDS:
            self._end(running)

    def _end(self, running: _Running) -> None:
        ray.kill(running.host)
        self._running.remove(running)

    def _new(self) -> _Running:
        name, scaling, resources = f"orpo-ray-host-{uuid.uuid4().hex}", self._recipe.scaling, self._resources
        options: dict[str, Any] = {
            "name": name,
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "max_concurrency": 2 * self.size + 2,
            "max_restarts": scaling.max_failures,
            "max_task_retries": -1,
        }
        if scaling.accelerator_type is not None and resources.gpus:
            options["accelerator_type"] = scaling.accelerator_type
        if scaling.labels:
            options["label_selector"] = scaling.labels
        return _Running(ray.remote(Host).options(**options).remote(), name)

    def _group(self, trials: Sequence[Trial]) -> Group:
        recipe, (train, held_out) = self._recipe, self._data
        assert held_out is not None
        runs = f"{recipe.name}/{TRIALS}"
        recipes = {
            trial.name: with_params(recipe, trial.params, f"{runs}/{trial.name}").model_dump(mode="json")
            for trial in trials
        }
        parents = {
            trial.name: (f"{recipe.run_uri}/{TRIALS}/{trial.parent:04d}", trial.parent_step)
            for trial in trials
            if trial.parent is not None
        }
        hosted = HostedRuns(recipes, train, held_out, self._num_steps, self._resources)
        return Group(hosted, recipe.scaling.max_failures + 1, parents)


def _is_sound(running: _Running) -> bool:
    """Whether a free host has not died since."""
    try:
        return bool(ray.get(running.host.is_sound.remote(), timeout=ANSWER_SECONDS))
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        return False
