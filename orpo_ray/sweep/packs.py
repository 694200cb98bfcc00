"""The packs of a sweep: whether its trials can share a process, how many do, and which are in which."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.tune_schema import TuneConfig
from orpo_ray.data.from_recipe import RunRows
from orpo_ray.errors import UserError
from orpo_ray.ray_cluster.start import on_this_node
from orpo_ray.storage.run_folder import TRIALS
from orpo_ray.streaming.pipeline import ENCODE_ENV
from orpo_ray.sweep.pack import Pack
from orpo_ray.sweep.record import Trial
from orpo_ray.sweep.space import Space, with_params
from orpo_ray.training.packed_launch import PackConfig
from orpo_ray.training.resources import Resources
from orpo_ray.training.side_by_side import why_not_side_by_side

MOST = 8
"""Trials of a pack that nobody chose a number for."""
CLOSE_SECONDS = 60.0
"""How long the trials of a pack may take to leave it: a step, and the end of an upload."""


def why_not_packed(recipe: Recipe, space: Space) -> str | None:
    """Say why trials of a search cannot share a process; None if they can, as far as the recipe and its model tell.

    Asks a Ray task for the model.

    Raises:
        UserError: the model cannot be found or trained.
    """
    if recipe.tune.scheduler == "pbt":
        return "tune.scheduler is pbt, whose trials go on from each other's checkpoints"
    if recipe.eval.generate:
        return "eval.generate is not 0"
    if recipe.tracking.trackio.enabled:
        return "tracking.trackio is enabled, which has one run at a time in a process"
    first = {each.key: each.extremes()[0] for each in space}
    corners = [first] + [first | {each.key: value} for each in space for value in each.extremes()[1:]]
    if (why := why_not_side_by_side([with_params(recipe, params, recipe.name) for params in corners])) is not None:
        return why
    task = ray.remote(why_model_cannot).options(
        num_cpus=0, scheduling_strategy=on_this_node(), runtime_env=ENCODE_ENV, max_retries=0
    )
    try:
        found: str | None = ray.get(task.remote(recipe))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return found


def why_model_cannot(recipe: Recipe) -> str | None:
    """Say why adapters cannot run side by side on the model of a recipe, by its config alone. Raises UserError."""
    import torch

    from orpo_ray.model.loading import load_config, pick_attention
    from orpo_ray.objective import multi_adapter
    from orpo_ray.objective.pair_model import PairModel
    from orpo_ray.planning.activations import NORM, unloaded_model

    config = load_config(recipe.model)
    attention = pick_attention(recipe.model, config)
    if attention.layout != "shared_prefix":
        return f"the model cannot share a prefix: {attention.why or 'model.attention is concatenated'}"
    # 4-bit layers hold the same adapters as those they replace.
    model_config = recipe.model.model_copy(update={"quantization": None})
    model = unloaded_model(model_config, config, torch.float32, attention.layout, "cpu")
    return multi_adapter.why_not_side_by_side(PairModel(model, NORM))


def wanted_size(tune: TuneConfig, num_trials: int, places: int) -> int:
    """Return how many trials would share a process, if they can.

    Args:
        tune: section of the recipe.
        num_trials: number of trials.
        places: processes that the cluster has room for.
    """
    most = num_trials if tune.max_concurrent == "auto" else min(tune.max_concurrent, num_trials)
    if tune.pack == "off":
        return 1
    return min(-(-most // places), MOST) if tune.pack == "auto" else min(tune.pack, most)


def pack_size(recipe: Recipe, space: Space, num_trials: int, places: int, shares_rows: bool) -> int:
    """Return how many trials share a process; 1 if none do.

    Args:
        recipe: of the sweep.
        space: of the sweep.
        num_trials: number of trials.
        places: processes that the cluster has room for.
        shares_rows: whether all trials read the same rows.

    Raises:
        UserError: the recipe asks for packs that are not possible, or its model cannot be trained.
    """
    wanted = recipe.tune.pack
    size = wanted_size(recipe.tune, num_trials, places)
    if size == 1 and wanted in ("auto", "off", 1):
        return 1
    why = why_not_packed(recipe, space) if shares_rows else "they read different rows"
    if why is None:
        return size
    if wanted == "auto":
        return 1
    problem = f"the trials of this search cannot share a process: {why}"
    raise UserError(problem, field="tune.pack", value=wanted, fix="set it to auto")


@dataclass
class _Running:
    pack: Any
    """The actor."""
    left: dict[int, str]
    """Numbers and names of the trials that have not ended."""
    end: ray.ObjectRef | None = None
    """Of the wait for the end of a pack that all trials have left."""


class Packs:
    """Starts the packs of a sweep and ends them.

    Args:
        recipe: of the sweep, with what all trials have in common filled in.
        data: the rows of all trials.
        num_steps: of each trial.
        size: most trials of a pack.
        places: packs at a time.
        resources: of the process of a pack.
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
        """Whether another pack can start."""
        self._running = [each for each in self._running if not _is_over(each)]
        return len(self._running) < self._places

    def start(self, trials: Sequence[Trial]) -> str:
        """Start a pack. Returns its name."""
        recipe, scaling = self._recipe, self._recipe.scaling
        train, held_out = self._data
        assert held_out is not None
        runs = f"{recipe.name}/{TRIALS}"
        recipes = {
            trial.name: with_params(recipe, trial.params, f"{runs}/{trial.name}").model_dump(mode="json")
            for trial in trials
        }
        resources = self._resources
        config = PackConfig(
            recipes=recipes,
            train=train,
            held_out=held_out,
            num_steps=self._num_steps,
            cpu_threads=resources.cpu_threads,
            max_encoders=resources.max_encoders,
            uses_gpu=resources.gpus > 0,
        )
        name = f"orpo-ray-pack-{uuid.uuid4().hex}"
        options: dict[str, Any] = {
            "name": name,
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "max_concurrency": 2 * len(trials) + 2,
            "max_restarts": scaling.max_failures,
            "max_task_retries": -1,
        }
        if scaling.accelerator_type is not None and resources.gpus:
            options["accelerator_type"] = scaling.accelerator_type
        if scaling.labels:
            options["label_selector"] = scaling.labels
        pack = ray.remote(Pack).options(**options).remote(config, scaling.max_failures + 1)
        self._running.append(_Running(pack, {trial.number: trial.name for trial in trials}))
        return name

    def leave(self, number: int) -> None:
        """Let a trial that has ended, or that was stopped, leave its pack."""
        for each in self._running:
            if number in each.left:
                each.pack.stop.remote(each.left.pop(number))
                if not each.left:
                    each.end = each.pack.wait.remote()

    def close(self) -> None:
        """Let all trials leave, wait for the end of the packs, and end their processes."""
        for number in [number for each in self._running for number in each.left]:
            self.leave(number)
        ends = [each.end for each in self._running if each.end is not None]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=CLOSE_SECONDS)
        for each in self._running:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(each.pack)


def _is_over(running: _Running) -> bool:
    """Whether all trials have left a pack and its process has nothing left to do; ends the process then."""
    if running.end is None or not ray.wait([running.end], timeout=0)[0]:
        return False
    ray.kill(running.pack)
    return True
