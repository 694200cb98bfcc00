"""Records of sweeps with planted results, made without training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from orpo_ray.config.recipe import Recipe
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.sweep.record import Record, Trial
from orpo_ray.sweep.searchers import RandomSampler
from orpo_ray.sweep.space import Params, Space, make_space
from support.tiny_runs import tiny_recipe

METRIC = "eval/rewards/margins"
STEPS, EVERY = 40, 10
SEARCH = {"orpo.beta": {"low": 0.01, "high": 1.0}, "optim.learning_rate": {"low": 1e-5, "high": 1e-2}}


def sweep_recipe(storage: Path, search: dict[str, Any] | None = None, **tune: Any) -> Recipe:
    """Return the recipe of a small sweep over beta and the learning rate, ranked by margins."""
    options = {"search": search or SEARCH, "metric": METRIC} | tune
    return tiny_recipe(storage, "sweep", data={"eval": "easy-vqa:test"}, tune=options).with_absolute_paths()


def surface(params: Params, step: int = STEPS) -> float:
    """Return a planted metric: best at beta 0.1 and a learning rate of 1e-3, which matters most; grows over steps."""
    beta, rate = math.log10(params["orpo.beta"]) + 1, math.log10(params["optim.learning_rate"]) + 3
    return (1 - math.exp(-step / 15)) * (1.5 - 0.9 * rate**2 - 0.15 * beta**2)


def planted_record(recipe: Recipe, count: int = 16, noise: float = 0.03) -> tuple[Record, Space]:
    """Return the record of a sweep: some trials stopped early, one failed before its first evaluation."""
    space, rng = make_space(recipe), np.random.default_rng(0)
    record = Record(recipe, seconds=640.0, num_steps=STEPS)
    sampler = RandomSampler(space, seed=3)
    for number in range(count):
        params = sampler.ask(number)
        assert params is not None
        trial = record.new(params)
        add_history(trial, EVERY if number % 3 == 1 else STEPS, noise * rng.normal())
        trial.state = "stopped early" if number % 3 == 1 else "finished"
    record.trials[-2].state, record.trials[-2].error = "failed", "TrainingDiverged: the loss is <b>nan</b> at step 7"
    record.trials[-2].history = []
    return record, space


def add_history(trial: Trial, last: int, noise: float = 0.0) -> None:
    """Give a trial its evaluations."""
    for step in range(trial.parent_step + EVERY, last + 1, EVERY):
        value = surface(trial.params, step) + noise
        accuracy = 1 / (1 + math.exp(-2 * value))
        line = {"step": step, "seconds": 1.5 * step, METRIC: value, "eval/rewards/accuracies": accuracy}
        trial.history.append(line | ({"eval/grounding_gap": 0.1 + 0.2 * accuracy} if step == STEPS else {}))
        trial.seconds = trial.own_seconds = 1.5 * step


def folder_of(recipe: Recipe) -> RunFolder:
    """Make the folder of a sweep."""
    folder = RunFolder(recipe.run_uri)
    folder.make()
    return folder
