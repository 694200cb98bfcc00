"""What can be evaluated: a run, a folder of a model or of adapters, a model of the hub; and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orpo_ray.config.load import apply_overrides, parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.from_recipe import encoder_of
from orpo_ray.errors import UserError
from orpo_ray.model.adapter_folder import ADAPTER_CONFIG, adapter_config, is_adapter, load_adapted
from orpo_ray.model.loading import load_model
from orpo_ray.storage.files import is_remote
from orpo_ray.storage.run_folder import FINAL, RECIPE_FILE, RunFolder, not_a_run

# A folder with one of these files has its own processor.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Target:
    """A model to evaluate."""

    name: str
    """As the user gave it."""
    recipe: Recipe
    """Of the run, or one made for the model."""
    model: ModelConfig
    """How to load the model, or the base model of adapters."""
    folder: Path | None = None
    """The folder of the model or of the adapters; None for a model of the hub."""
    overrides: tuple[str, ...] = ()
    """`FIELD=VALUE`, as given."""
    is_base: bool = False
    """Whether another model is compared with it."""

    @property
    def title(self) -> str:
        """What to call the model in messages."""
        return str(self.folder or self.model.id)

    def encoder(self, data: Recipe) -> EncoderSpec:
        """Return how this model takes the pairs of a recipe."""
        spec = replace(encoder_of(data), model_id=self.recipe.model.id, revision=self.recipe.model.revision)
        # Adapters without a processor in their folder use the one of the base model. A local copy of a remote folder
        # is on this node alone, and pairs are encoded on all of them.
        if (
            self.folder is not None
            and not is_remote(self.name)
            and any((self.folder / name).is_file() for name in PROCESSOR_FILES)
        ):
            return replace(spec, model_id=str(self.folder), revision=None)
        return spec

    def load(self, device: torch.device, seed: int) -> nn.Module:
        """Load the model. Raises UserError."""
        if self.folder is not None and is_adapter(self.folder):
            return load_adapted(self.model, self.folder, device, seed)
        return load_model(self.model, device, seed)


def find_target(folder: RunFolder, overrides: Sequence[str]) -> Target:
    """Find the model in a folder, and the recipe that says how its pairs are read.

    Args:
        folder: of a run, a model or adapters. A mirror of a remote run is deleted with this object.
        overrides: `FIELD=VALUE` for the recipe.

    Raises:
        UserError: the folder or the recipe cannot be used.
    """
    recipe, found = _recipe_of(folder, overrides)
    if is_adapter(found):
        return Target(folder.uri, recipe, recipe.model, found, tuple(overrides))
    whole: dict[str, Any] = {"id": str(found), "revision": None, "lora": None, "freeze": [], "quantization": None}
    return Target(folder.uri, recipe, recipe.model.model_copy(update=whole), found, tuple(overrides))


def find_base(name: str, folder: RunFolder) -> Target:
    """Find a model to compare with: as `find_target`, or a model of the hub by its name."""
    if folder.has(RECIPE_FILE) or folder.has(ADAPTER_CONFIG) or folder.has("config.json"):
        return replace(find_target(folder, []), is_base=True)
    raw = {"name": "base", "model": {"id": name}, "data": {"train": "none"}}
    recipe = parse_recipe(raw, source=name)
    return Target(name, recipe, recipe.model, is_base=True)


def find_again(target: Target) -> tuple[RunFolder, Target]:
    """Download a model of a remote folder on another node. The local copy is deleted with the RunFolder."""
    folder = RunFolder(target.name)
    return folder, find_base(target.name, folder) if target.is_base else find_target(folder, target.overrides)


def _recipe_of(folder: RunFolder, overrides: Sequence[str]) -> tuple[Recipe, Path]:
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
        fix = "give a run folder or a model folder; download a hub model first: hf download NAME --local-dir FOLDER"
        raise not_a_run(folder, fix, or_model=f"config.json or {ADAPTER_CONFIG}")
    # The base model of adapters can have moved, so an override can change its id. A full model is the folder itself.
    if not is_adapter(model) and any(override.startswith("model.id=") for override in overrides):
        raise UserError(
            "the model is the one in the folder", field="model.id", fix="give the folder of the model to evaluate"
        )
    apply_overrides(raw, list(overrides))
    _drop_fraction(raw, overrides)
    return parse_recipe(raw, source=uri).with_absolute_paths(), model.resolve()


def _drop_fraction(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Drop the fraction that the run held out of its training rows if an override names other pairs."""
    names = {override.partition("=")[0] for override in overrides}
    data = raw.get("data")
    if "data.eval" in names and "data.eval_fraction" not in names and isinstance(data, dict) and data.get("eval"):
        data.pop("eval_fraction", None)
