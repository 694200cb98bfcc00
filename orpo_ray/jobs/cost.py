"""What a job will cost, by `orpo-ray plan`, in a line or two."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.planning.gpus import is_type
from orpo_ray.planning.imports import uncollected
from orpo_ray.sweep.space import make_space, trials_to_begin

ESTIMATED = ("train", "tune", "iterate")  # the commands that train


def cost_lines(recipe: Recipe, prices: Sequence[str], command: str = "train") -> list[str]:
    """Estimate the time and cost of a recipe on the GPUs that it asks for, or else on the cheapest.

    Args:
        recipe: the recipe.
        prices: as in `orpo-ray plan --price-per-hour`.
        command: one of `ESTIMATED`. A sweep and an iteration train several times.

    Raises:
        UserError: a price or the search of a sweep is wrong. A model whose config cannot be read from here is said in
            the lines instead.
    """
    trials = trials_to_begin(recipe, make_space(recipe)) if command == "tune" else 1
    if recipe.scaling.gpus_per_worker == 0:
        return ["not estimated: the recipe trains on CPUs"]
    with uncollected():
        from orpo_ray.planning.gpus import gpus_with_prices
        from orpo_ray.planning.plan import Options, plan
    gpus_with_prices(prices)  # refuses a wrong price; what `plan` refuses after this is about the model
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print
            report = plan(recipe, Options(prices))
            rows = recipe.synthesize.max_rows
            # A round makes at most one pair of each row.
            if command == "iterate" and rows is not None and rows < report["step"]["training_pairs"]:
                report = plan(recipe, Options(prices, pairs=rows))
    except UserError as error:
        return [f"not estimated: {error.problem}"]
    estimates = _estimates(report, recipe.scaling.accelerator_type)
    if isinstance(estimates, str):
        return [estimates]
    return [_line_of_command(each, command, recipe, trials) for each in estimates]


def _estimates(report: Mapping[str, Any], accelerator: str | None) -> list[Mapping[str, Any]] | str:
    """Return the estimates for the cheapest GPUs and, if the type is open, the fastest; or why there are none."""
    wanted = [each for each in report["gpus"] if accelerator is None or is_type(each["gpu"], accelerator)]
    fitting = sorted((each for each in wanted if each["recipe"]), key=_cost)
    if not wanted:
        return f"not estimated: `orpo-ray plan` knows no {accelerator}"
    if not fitting:
        names = ", ".join(each["gpu"] for each in wanted)
        return f"no estimate: by the plan, the recipe does not fit on {names} (see `orpo-ray plan`)"
    found = fitting[:1]
    if accelerator is None:
        fastest = min(fitting, key=lambda each: float(each["recipe"]["hours"]))
        found += [fastest] if fastest is not fitting[0] else []
    return found


def _line_of_command(each: Mapping[str, Any], command: str, recipe: Recipe, trials: int) -> str:
    line = _line(each)
    if command == "tune":
        most, limit = trials * _cost(each), recipe.tune.max_cost
        if limit is not None and limit < most:
            return f"{trials:,} trials, each {line}: at most {_money(limit)}, where tune.max_cost ends the search"
        return f"{trials:,} trials, each {line}: at most {_money(most)}; less if trials end early or train side by side"
    if command == "iterate":
        rounds = recipe.synthesize.rounds
        return f"{rounds} rounds, each {line}: at most {_money(rounds * _cost(each))}; synthesis not included"
    return line


def _line(each: Mapping[str, Any]) -> str:
    estimate = each["recipe"]
    hours = estimate["hours"]
    time = f"{max(1, round(hours * 60))} min" if hours < 1 else f"{hours:,.1f} h"
    price = f"${each['price_per_hour']:.2f} per GPU and hour"
    return f"about {time} and {_money(_cost(each))} on {estimate['workers']} x {each['gpu']} ({price})"


def _cost(each: Mapping[str, Any]) -> float:
    """Return US$ of one run."""
    return float(each["recipe"]["cost"])


def _money(cost: float) -> str:
    return f"${cost:,.2f}" if cost >= 0.01 else "less than $0.01"
