"""Population-based training: the worst trials at a step go on from checkpoints of the best, with changed values.

A trial that goes on is a new trial with its own run folder, which begins with a copy of the checkpoint. So every run
folder holds a run of one recipe.
"""

from __future__ import annotations

import math

import numpy as np

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.tune_schema import LEAST_POPULATION
from orpo_ray.errors import UserError
from orpo_ray.sweep.record import STEP, Record, Trial
from orpo_ray.sweep.space import Dimension, Params, Space

QUARTER = 0.25
RESAMPLED = 0.25
"""Probability that a value is drawn anew rather than changed."""
FACTORS = (0.8, 1.2)
# Fields that can change within a run. Others belong to what a checkpoint holds: shapes, data, the schedule's length.
CHANGEABLE = (
    "optim.learning_rate",
    "optim.weight_decay",
    "optim.adam_beta1",
    "optim.adam_beta2",
    "optim.adam_epsilon",
    "optim.max_grad_norm",
    "model.lora.dropout",
)


def check_population(recipe: Recipe, space: Space) -> None:
    """Raise UserError if a search cannot be done by population-based training."""
    section = f"{recipe.objective.section}."
    for key in space.keys:
        if key not in CHANGEABLE and not key.startswith(section):
            raise UserError(
                f"'{key}' cannot change within a run, as scheduler pbt would have it",
                field="tune.search",
                fix=f"search {section}beta, {', '.join(CHANGEABLE)}, or set tune.scheduler: asha",
            )
    if recipe.deepspeed.zero_stage:
        raise UserError(
            "scheduler pbt needs an unsharded optimizer, whose settings can change within a run",
            field="deepspeed.zero_stage",
            value=recipe.deepspeed.zero_stage,
            fix="set it to 0, or tune.scheduler: asha",
        )


class Population:
    """Decides which trials are replaced, and by what.

    Args:
        space: of the search.
        record: of the sweep.
    """

    def __init__(self, space: Space, record: Record) -> None:
        self._space, self._record = space, record

    def successor(self, trial: Trial) -> tuple[Params, Trial, int] | None:
        """Return the values of a trial's successor, the trial whose checkpoint it begins with and the step of that.

        None if the trial should go on.

        Args:
            trial: was evaluated just now. It is compared at the last of its evaluations at which enough others were
                evaluated, whether they still run or not.
        """
        for line in reversed(trial.history):
            ranked = self._ranked_at(int(line[STEP]))
            if len(ranked) >= LEAST_POPULATION:
                break
        else:
            return None
        quarter = math.floor(QUARTER * len(ranked))
        if trial.number not in [each.number for each in ranked[:quarter]]:
            return None
        rng = np.random.default_rng([self._record.tune.seed, trial.number, trial.step])
        donor = ranked[len(ranked) - 1 - rng.integers(quarter)]
        step = max(int(line[STEP]) for line in donor.history if line[STEP] <= trial.step)
        return {each.key: _changed(each, donor.params[each.key], rng) for each in self._space}, donor, step

    def _ranked_at(self, step: int) -> list[Trial]:
        """Return the trials that were evaluated at a step, worst first."""
        metric, sign = self._record.tune.metric, 1.0 if self._record.tune.direction == "max" else -1.0
        scored = [(each, each.value_at(metric, step)) for each in self._record.trials if each.state != "failed"]
        ranked = sorted((sign * value, -each.number, each) for each, value in scored if value is not None)
        return [each for *_, each in ranked]


def _changed(dimension: Dimension, value: object, rng: np.random.Generator) -> object:
    """Return a value near another one, or one of the whole range."""
    if rng.random() < RESAMPLED:
        return dimension.value(float(rng.random()))
    if dimension.choices:
        place = dimension.choices.index(value) + int(rng.choice([-1, 1]))
        return dimension.choices[min(max(place, 0), len(dimension.choices) - 1)]
    assert isinstance(value, int | float)
    changed = min(max(value * float(rng.choice(FACTORS)), dimension.low), dimension.high)
    return round(changed) if dimension.is_whole else changed
