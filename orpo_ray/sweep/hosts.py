"""The hosts of a sweep: which trials can have one, and which trials are in which."""

from __future__ import annotations

import contextlib
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

CLOSE_SECONDS = 60.0
"""How long trials may take to leave: a step, and the end of an upload."""
# Ray starts processes for these, or DeepSpeed keeps state of the process.
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
    """Of the group's end."""


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

    @property
    def has_place(self) -> bool:
        """Whether a host is free, or another one can start."""
        self._running = [each for each in self._running if not _is_over(each)]
        return len(self._running) < self._places or any(each.end is None for each in self._running)

    def start(self, trials: Sequence[Trial]) -> str:
        """Give trials to a host that is free, or to a new one. Returns its name."""
        found = next((each for each in self._running if each.end is None), None)
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

    def close(self) -> None:
        """Let all trials leave, wait for their ends, and end the processes."""
        for number in [number for each in self._running for number in each.left]:
            self.leave(number)
        ends = [each.end for each in self._running if each.end is not None]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=CLOSE_SECONDS)
        for each in self._running:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(each.host)

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


def _is_over(running: _Running) -> bool:
    """Whether a host has ended. Frees one that all trials have left; ends it if it can take no others."""
    if running.end is None or running.left or not ray.wait([running.end], timeout=0)[0]:
        return False
    try:
        is_sound = ray.get(running.end)
    except ray.exceptions.RayError:
        is_sound = False
    running.end = None
    if not is_sound:
        ray.kill(running.host)
    return not is_sound
