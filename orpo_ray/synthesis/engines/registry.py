"""The engines by their names in a recipe."""

from __future__ import annotations

from orpo_ray.config.recipe import Recipe
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.candidates import Engine
from orpo_ray.synthesis.engines.drafts import DraftEngine
from orpo_ray.synthesis.engines.server_engine import ServerEngine
from orpo_ray.synthesis.engines.transformers_engine import TransformersEngine
from orpo_ray.synthesis.local_model import LocalModel


def make_engine(recipe: Recipe, model: LocalModel, folder: RunFolder) -> Engine:
    """Make the engine that a recipe names.

    Args:
        recipe: the recipe.
        model: what `transformers` runs.
        folder: the run folder, where the answers of `vllm` are.
    """
    if recipe.synthesize.engine == "server":
        return ServerEngine(recipe.synthesize)
    return DraftEngine(folder, model) if recipe.synthesize.engine == "vllm" else TransformersEngine(model)
