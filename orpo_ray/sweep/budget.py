"""What a sweep may cost: prices of the cluster's GPUs, and the end of a sweep whose time or money is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune

from orpo_ray.config.tune_schema import TuneConfig
from orpo_ray.errors import UserError
from orpo_ray.planning.gpus import gpus_with_prices, is_type
from orpo_ray.sweep.board import Board
from orpo_ray.training.placement import ACCELERATOR


def price_of(
    tune_config: TuneConfig, prices: Sequence[str], nodes: Sequence[Mapping[str, float]], gpus_per_trial: float
) -> float:
    """Return the price of a GPU per hour in US$: of the dearest type that the nodes have; 0 where it is not known.

    Args:
        tune_config: of the recipe.
        prices: as in `orpo-ray plan --price-per-hour`.
        nodes: the resources of each node that may hold workers.
        gpus_per_trial: GPUs of a trial.

    Raises:
        UserError: a price is wrong; or there is a budget, and no price.
    """
    known = gpus_with_prices(prices)
    kinds = {name.removeprefix(ACCELERATOR) for node in nodes for name in node if name.startswith(ACCELERATOR)}
    found = [gpu.price for gpu in known if any(is_type(gpu.name, kind) for kind in kinds)] if gpus_per_trial else []
    if tune_config.max_cost is not None and not found:
        what = f"GPUs of the type {', '.join(sorted(kinds)) or 'unknown'}" if gpus_per_trial else "trials without GPUs"
        raise UserError(
            f"the price of {what} is not known, so the cost of the search is not either",
            field="tune.max_cost",
            value=tune_config.max_cost,
            fix="set tune.max_hours instead; `orpo-ray plan` lists the types that have prices",
        )
    return max(found, default=0.0)


class BudgetStopper(tune.Stopper):
    """Ends a sweep whose time or money is spent."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Let every trial go on."""
        return False

    def stop_all(self) -> bool:
        """Look at the budgets."""
        self._board.stopped_by = self._board.stopped_by or self._board.should_stop() or ""
        return bool(self._board.stopped_by)
