"""`orpo-ray evaluate`: score held-out pairs with a run's final model, or with any model or adapters."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console

from orpo_ray.config.load import apply_overrides, parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.from_recipe import encoder_of, held_out_data
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import UserError
from orpo_ray.evaluation.evaluator import Evaluator, HeldOut, with_prefix
from orpo_ray.model.adapter_folder import ADAPTER_CONFIG, adapter_config, is_adapter, load_adapted
from orpo_ray.model.loading import concatenated_because, load_model, pick_attention
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.run_folder import FINAL, RECIPE_FILE, RunFolder

# A folder with one of these files has its own processor.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def evaluate_run(uri: str, overrides: list[str], console: Console) -> dict[str, float]:
    """Score the held-out pairs of a run, a model or adapters.

    Args:
        uri: A run's folder, whose recipe and `final/` are used; or a folder of a model or of peft adapters, with
            `data.eval=...` among the overrides. Adapters are applied to the base model as the recipe loads it, in 4
            bits if the recipe says so.
        overrides: `FIELD=VALUE` for the recipe. With `data.eval`, a fraction that the run held out does not count.
        console: Gets one line about what is scored.

    Returns:
        The metrics of the recipe's objective as `eval/...`, with `eval/grounding_gap` unless the recipe leaves it out.

    Raises:
        UserError: The folder or the recipe cannot be used, or there are no held-out pairs.
    """
    with contextlib.redirect_stdout(sys.stderr):
        folder = RunFolder(uri.rstrip("/"))  # the local copy of a remote run is deleted with this object
        recipe, model = _recipe_of(folder, overrides)
        model_config = _model_config(recipe, model)
        held_out = held_out_data(recipe)
        if held_out is None:
            raise UserError("there are no held-out pairs", field="data.eval", fix="add data.eval=FILE to the command")
        start_ray()
        if why := pick_attention(model_config).why:
            console.print(concatenated_because(why), highlight=False, soft_wrap=True)
        console.print(f"scoring {held_out.end_sample:,} pairs with {model}", highlight=False, soft_wrap=True)
        return with_prefix(_evaluate(recipe, model_config, model, held_out), "eval")


def _model_config(recipe: Recipe, folder: Path) -> ModelConfig:
    """Return the model section for loading without adapters: the recipe's base model, or the model in the folder."""
    if is_adapter(folder):
        return recipe.model
    whole: dict[str, Any] = {"id": str(folder), "revision": None, "lora": None, "freeze": [], "quantization": None}
    return recipe.model.model_copy(update=whole)


def _evaluate(recipe: Recipe, model_config: ModelConfig, folder: Path, held_out: ReadSpec) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Adapters without a processor in their folder use the one of the base model.
    own_processor = any((folder / name).is_file() for name in PROCESSOR_FILES)
    spec = encoder_of(recipe)
    if own_processor:
        spec = replace(spec, model_id=str(folder), revision=None)
    encoder = spec.build()
    seed = recipe.optim.seed
    loaded = (
        load_adapted(model_config, folder, device, seed)
        if is_adapter(folder)
        else load_model(model_config, device, seed)
    )
    model = PairModel(loaded, PixelNorm.of(encoder.processor)).eval()
    planner = StepPlanner.of(load_objective(recipe), recipe.optim.tokens_per_microbatch, encoder, model, device)
    max_encoders = max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)
    evaluator = Evaluator(model, HeldOut(held_out, spec, max_encoders), planner)
    return evaluator.evaluate(recipe.eval.grounding).metrics


def _recipe_of(folder: RunFolder, overrides: list[str]) -> tuple[Recipe, Path]:
    """Find the recipe, and the folder of the model or the adapters. Raises UserError."""
    raw: dict[str, Any]
    uri = folder.uri
    if folder.has(RECIPE_FILE):
        folder.pull(RECIPE_FILE, FINAL)
        raw = read_mapping(folder.path / RECIPE_FILE)
        model = folder.path / FINAL
        if not model.is_dir():
            raise UserError(
                "the run has no final model yet", field=uri, fix="finish the run: the same train command resumes it"
            )
    elif folder.has(ADAPTER_CONFIG) and not folder.is_remote:
        model = folder.path
        config = adapter_config(model)
        base = {"id": config["base_model_name_or_path"], "revision": config.get("revision"), "lora": {}}
        raw = {"name": "evaluation", "model": base, "data": {"train": "none"}}
    elif folder.has("config.json") and not folder.is_remote:
        raw = {"name": "evaluation", "model": {"id": uri}, "data": {"train": "none"}}
        model = folder.path
    else:
        raise UserError(
            f"the folder is neither a run (no {RECIPE_FILE}) nor a model (no config.json or {ADAPTER_CONFIG})",
            field=uri,
            fix="give a run folder or a model folder; download a hub model first: hf download NAME --local-dir FOLDER",
        )
    # The base model of adapters can have moved, so an override can change its id. A full model is the folder itself.
    if not is_adapter(model) and any(override.startswith("model.id=") for override in overrides):
        raise UserError(
            "the model is the one in the folder", field="model.id", fix="give the folder of the model to evaluate"
        )
    apply_overrides(raw, overrides)
    _drop_fraction(raw, overrides)
    return parse_recipe(raw, source=uri).with_absolute_paths(), model.resolve()


def _drop_fraction(raw: dict[str, Any], overrides: list[str]) -> None:
    """Drop the fraction that the run held out of its training rows if an override names other pairs."""
    names = {override.partition("=")[0] for override in overrides}
    data = raw.get("data")
    if "data.eval" in names and "data.eval_fraction" not in names and isinstance(data, dict) and data.get("eval"):
        data.pop("eval_fraction", None)
