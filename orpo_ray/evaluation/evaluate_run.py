"""`orpo-ray evaluate`: score held-out pairs with a run's final model, or with any model or adapters."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import UserError
from orpo_ray.evaluation.categories import column_values
from orpo_ray.evaluation.evaluator import Evaluator, HeldOut, Scores, with_prefix
from orpo_ray.evaluation.pair_scores import write_pair_scores
from orpo_ray.evaluation.summary import Summary, summarize
from orpo_ray.evaluation.targets import Target, find_base, find_target
from orpo_ray.model.loading import concatenated_because, pick_attention
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.run_folder import EVAL_PAIRS_FILE, RECIPE_FILE, RunFolder


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `orpo-ray evaluate`."""

    base: str | None = None
    """A run, a model folder or a hub model to compare with, on the same pairs."""
    by: Sequence[str] = ()
    """Columns of the data by whose values the pairs are grouped."""


@dataclass(frozen=True)
class Evaluation:
    """The result of `orpo-ray evaluate`."""

    metrics: dict[str, float]
    """The objective's metrics as `eval/...`, and those of grounding unless the recipe leaves it out."""
    summary: Summary

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return self.metrics | self.summary.as_json()


def evaluate_run(
    uri: str, overrides: Sequence[str], console: Console, options: EvaluateOptions = EvaluateOptions()
) -> Evaluation:
    """Score the held-out pairs of a run, a model or adapters.

    Each pair's scores are kept in the folder of a run that is evaluated on its own pairs.

    Args:
        uri: A run's folder, whose recipe and `final/` are used; or a folder of a model or of peft adapters, with
            `data.eval=...` among the overrides. Adapters are applied to the base model as the recipe loads it, in 4
            bits if the recipe says so.
        overrides: `FIELD=VALUE` for the recipe. With `data.eval`, a fraction that the run held out does not count.
        console: Gets one line about what is scored.
        options: What else to do.

    Raises:
        UserError: The folder or the recipe cannot be used, or there are no held-out pairs.
    """
    with contextlib.redirect_stdout(sys.stderr):
        folder = RunFolder(uri.rstrip("/"))  # the local copy of a remote run is deleted with this object
        target = find_target(folder, overrides)
        recipe, held_out = target.recipe, held_out_data(target.recipe)
        if held_out is None:
            raise UserError("there are no held-out pairs", field="data.eval", fix="add data.eval=FILE to the command")
        categories = {name: column_values(held_out, name) for name in options.by}
        base_folder = None if options.base is None else RunFolder(options.base.rstrip("/"))
        base = None if base_folder is None or options.base is None else find_base(options.base, base_folder)
        start_ray()
        scores = _score(target, recipe, held_out, console, recipe.eval.grounding)
        if folder.has(RECIPE_FILE) and not any(each.startswith(("data.", "eval.")) for each in overrides):
            write_pair_scores(folder, EVAL_PAIRS_FILE, scores.pairs, data=held_out.digest)
        compared = None
        if base is not None:
            compared = (base.name, _score(base, recipe, held_out, console, False).pairs)
        summary = summarize(scores.pairs, categories, compared)
        return Evaluation(with_prefix(scores.metrics, "eval"), summary)


def _score(target: Target, recipe: Recipe, held_out: ReadSpec, console: Console, grounding: bool) -> Scores:
    """Score the pairs of a recipe with a model; with `grounding`, also with exchanged and with blank images."""
    if why := pick_attention(target.model).why:
        console.print(concatenated_because(why), highlight=False, soft_wrap=True)
    console.print(f"scoring {held_out.end_sample:,} pairs with {target.title}", highlight=False, soft_wrap=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = target.encoder(recipe)
    encoder = spec.build()
    model = PairModel(target.load(device, recipe.optim.seed), PixelNorm.of(encoder.processor)).eval()
    planner = StepPlanner.of(load_objective(recipe), recipe.optim.tokens_per_microbatch, encoder, model, device)
    max_encoders = max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)
    evaluator = Evaluator(model, HeldOut(held_out, spec, max_encoders), planner)
    return evaluator.evaluate(grounding, blank=grounding)
