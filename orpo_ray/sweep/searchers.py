"""Which values the next trial gets: at random, by a grid, or near those of good trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from orpo_ray.config.tune_schema import TuneConfig
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.sweep.record import Trial
from orpo_ray.sweep.space import Params, Space


class Sampler(Protocol):
    """Chooses the values of trials."""

    def ask(self, number: int) -> Params | None:
        """Return the values of a new trial; None if all points of the space are taken.

        Args:
            number: of the trial. Asked for in order, each once.
        """

    def tell(self, trial: Trial) -> None:
        """Take what a trial has reached, each time that it is evaluated and when it ends."""


class RandomSampler:
    """Draws each trial's values from the seed and the trial's number, so that an interrupted sweep draws the same."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def ask(self, number: int) -> Params | None:
        """Draw values."""
        return self._space.params(np.random.default_rng([self._seed, number]).random(len(self._space)).tolist())

    def tell(self, trial: Trial) -> None:
        """Do nothing: random values do not depend on results."""


class GridSampler:
    """Goes through all points of a grid, in an order that mixes them, so that a search that ends early saw all parts.

    Raises:
        UserError: the grid has too many points.
    """

    def __init__(self, space: Space, seed: int) -> None:
        points = space.grid()
        self.points = [points[place] for place in np.random.default_rng(seed).permutation(len(points))]

    def ask(self, number: int) -> Params | None:
        """Return the next point."""
        return self.points[number] if number < len(self.points) else None

    def tell(self, trial: Trial) -> None:
        """Do nothing: a grid does not depend on results."""


def make_sampler(tune: TuneConfig, space: Space, name: str, folder: RunFolder, trials: Sequence[Trial] = ()) -> Sampler:
    """Return the sampler of a search.

    Args:
        tune: how to search.
        space: where.
        name: of the sweep.
        folder: of the sweep, where Optuna's storage goes.
        trials: the trials of earlier sessions.

    Raises:
        UserError: the grid is too large, or Optuna is not installed.
    """
    if tune.searcher == "random":
        return RandomSampler(space, tune.seed)
    if tune.searcher == "grid":
        return GridSampler(space, tune.seed)
    from orpo_ray.sweep.optuna_search import OptunaSampler

    return OptunaSampler(tune, space, name, folder, trials)
