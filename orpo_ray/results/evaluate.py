"""`orpo-ray evaluate`: score held-out pairs with a run's final model, or with any model and a recipe's data."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import Any

import ray
import torch
from rich.console import Console

from orpo_ray.data.reading import ReadSpec
from orpo_ray.data.stream import iter_steps
from orpo_ray.errors import UserError
from orpo_ray.model.loading import PixelNorm, load_model, pick_attention
from orpo_ray.objective.forward import PairModel
from orpo_ray.objective.steps import StepPlanner
from orpo_ray.recipe import Recipe, apply_overrides, parse_recipe, read_mapping
from orpo_ray.results.scoring import Scores, grounding, score, with_prefix
from orpo_ray.run_folder import RunFolder
from orpo_ray.training.checkpoint import FINAL
from orpo_ray.training.data import encoder_of, held_out_data
from orpo_ray.training.launch import RECIPE_FILE, concatenated_because, start_ray


def evaluate_run(uri: str, overrides: list[str], console: Console) -> dict[str, float]:
    """Metrics of the held-out pairs as `eval/...`, with `eval/grounding_gap`. Raises UserError.

    uri: of a run's folder (its recipe and `final/` are used) or a model's (then `data.eval=...` says what to score).
    """
    with contextlib.redirect_stdout(sys.stderr):
        folder = RunFolder(uri.rstrip("/"))  # what it mirrors of a remote run is gone when it goes
        recipe, model = _recipe_of(folder, overrides)
        held_out = held_out_data(recipe)
        if held_out is None:
            raise UserError("there are no held-out pairs", field="data.eval", fix="add data.eval=FILE to the command")
        start_ray()
        if why := pick_attention(recipe.model.model_copy(update={"id": model, "revision": None})).why:
            console.print(concatenated_because(why), highlight=False, soft_wrap=True)
        console.print(f"scoring {held_out.last_slot:,} pairs with {model}", highlight=False, soft_wrap=True)
        return with_prefix(_evaluate(recipe, model, held_out), "eval")


def _evaluate(recipe: Recipe, model_id: str, held_out: ReadSpec) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = replace(encoder_of(recipe), model_id=model_id, revision=None)
    encoder = spec.build()
    section = recipe.model.model_copy(update={"id": model_id, "revision": None, "lora": None, "freeze": []})
    model = PairModel(load_model(section, device, recipe.optim.seed), PixelNorm.of(encoder.processor)).eval()
    planner = StepPlanner.of(recipe, encoder, model, device)
    steps = -(-held_out.last_slot // held_out.pairs_per_step)
    max_encoders = max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)

    def one_pass(exchange: bool) -> Scores:
        read = replace(held_out, exchange_images=exchange)
        shares = ((share.pairs, len(share.bad)) for share in iter_steps(read, spec, 0, steps, max_encoders))
        return score(model, shares, planner, recipe.orpo.beta)

    seen = one_pass(exchange=False)
    if not recipe.eval.grounding:
        return seen.metrics
    return seen.metrics | grounding(seen, one_pass(exchange=True), device)


def _recipe_of(folder: RunFolder, overrides: list[str]) -> tuple[Recipe, str]:
    """The recipe to evaluate by, and what to load the model from."""
    raw: dict[str, Any]
    uri = folder.uri
    if folder.has(RECIPE_FILE):
        folder.pull(RECIPE_FILE, FINAL)
        raw = read_mapping(folder.path / RECIPE_FILE)
        model = folder.path / FINAL
        if not model.is_dir():
            raise UserError(
                "the run has no final model yet", field=uri, fix="let it end: the same train command resumes it"
            )
    elif folder.has("config.json") and not folder.is_remote:
        raw = {"name": "evaluation", "model": {"id": uri}, "data": {"train": "none"}}
        model = folder.path
    else:
        raise UserError(f"is neither a run (no {RECIPE_FILE}) nor a model (no config.json)", field=uri)
    if any(override.startswith("model.id=") for override in overrides):
        raise UserError("the model is the folder's", field="model.id", fix="give the folder of the model to evaluate")
    apply_overrides(raw, overrides)
    return parse_recipe(raw, source=uri).anchored(), str(model.resolve())
