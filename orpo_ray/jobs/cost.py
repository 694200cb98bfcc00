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


def cost_lines(recipe: Recipe, prices: Sequence[str]) -> list[str]:
    """Estimate the time and cost of a recipe on the GPUs that it asks for, or else on the cheapest.

    Args:
        recipe: the recipe.
        prices: as in `orpo-ray plan --price-per-hour`.

    Raises:
        UserError: a price is wrong. A model whose config cannot be read from here is said in the lines instead.
    """
    if recipe.scaling.gpus_per_worker == 0:
        return ["not estimated: the recipe trains on CPUs"]
    with uncollected():
        from orpo_ray.planning.gpus import gpus_with_prices
        from orpo_ray.planning.plan import Options, plan
    gpus_with_prices(prices)  # refuses a wrong price; what `plan` refuses after this is about the model
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print
            report = plan(recipe, Options(prices))
    except UserError as error:
        return [f"not estimated: {error.problem}"]
    return _lines(report, recipe.scaling.accelerator_type)


def _lines(report: Mapping[str, Any], accelerator: str | None) -> list[str]:
    wanted = [each for each in report["gpus"] if accelerator is None or is_type(each["gpu"], accelerator)]
    fitting = sorted((each for each in wanted if each["recipe"]), key=lambda each: float(each["recipe"]["cost"]))
    if not wanted:
        return [f"not estimated: `orpo-ray plan` knows no {accelerator}"]
    if not fitting:
        names = ", ".join(each["gpu"] for each in wanted)
        return [f"no estimate: by the plan, the recipe does not fit on {names} (see `orpo-ray plan`)"]
    lines = [_line(fitting[0])]
    if accelerator is None and len(fitting) > 1:
        fastest = min(fitting, key=lambda each: float(each["recipe"]["hours"]))
        lines += [_line(fastest)] if fastest is not fitting[0] else []
    return lines


def _line(each: Mapping[str, Any]) -> str:
    estimate = each["recipe"]
    hours, cost = estimate["hours"], estimate["cost"]
    time = f"{max(1, round(hours * 60))} min" if hours < 1 else f"{hours:,.1f} h"
    money = f"${cost:,.2f}" if cost >= 0.01 else "less than $0.01"
    price = f"${each['price_per_hour']:.2f} per GPU and hour"
    return f"about {time} and {money} on {estimate['workers']} x {each['gpu']} ({price})"
