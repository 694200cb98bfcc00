"""The typed recipe: YAML plus dotted overrides become one validated `Recipe`. Imports neither torch nor ray.

The fields are in `sections.py`; `Recipe.model_json_schema()` is the schema for editors.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml
from pydantic import Field, field_validator, model_validator

from orpo_ray.config.rules import refusals
from orpo_ray.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DeepspeedConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    OrpoConfig,
    ScalingConfig,
    TrackingConfig,
    TuneConfig,
)


class Recipe(Config):
    """Everything that a run is, in one file."""

    name: str = Field(min_length=1)
    """Name of the run and of its folder."""
    model: ModelConfig
    data: DataConfig
    orpo: OrpoConfig = Field(default_factory=OrpoConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    deepspeed: DeepspeedConfig = Field(default_factory=DeepspeedConfig)
    scaling: ScalingConfig = Field(default_factory=ScalingConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    tune: TuneConfig = Field(default_factory=TuneConfig)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", value):
            raise ValueError("must be made of letters, digits, '.', '_' and '-' (it names the run's folder)")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        if self.scaling.num_workers > self.optim.pairs_per_step:
            raise ValueError(
                f"scaling.num_workers ({self.scaling.num_workers}) exceeds optim.pairs_per_step "
                f"({self.optim.pairs_per_step}): a worker would have nothing to do in a step"
            )
        if self.eval.every_steps and not self.has_held_out:
            raise ValueError("eval.every_steps is set but data.eval is empty: give held-out pairs, or leave it out")
        if self.data.eval and self.data.eval_fraction:
            raise ValueError("data.eval and data.eval_fraction are both given: held-out pairs come from one of them")
        if refused := refusals(self):
            raise ValueError("\n  - ".join(refused))
        return self

    @property
    def has_held_out(self) -> bool:
        """Whether there are pairs to evaluate on."""
        return bool(self.data.eval or self.data.eval_fraction)

    @property
    def run_uri(self) -> str:
        """The run's folder, `<checkpoint.storage>/<name>`: an absolute path, or a URI."""
        storage = self.checkpoint.storage.rstrip("/")
        if "://" not in storage:
            storage = str((_lasting_folder() / Path(storage).expanduser()).resolve())
        return f"{storage}/{self.name}"

    def with_absolute_paths(self) -> Recipe:
        """The same recipe with every local path absolute: workers and trials run in folders of their own."""
        raw = self.model_dump(mode="json")
        raw["checkpoint"]["storage"] = self.run_uri.removesuffix(f"/{self.name}")
        if self.model.vision_cache is not None:
            raw["model"]["vision_cache"] = _absolute(self.model.vision_cache)
        if self.data.image_root is not None:
            raw["data"]["image_root"] = _absolute(self.data.image_root)
        for split in ("train", "eval"):
            mix: dict[str, float] = {}
            for source, weight in raw["data"][split].items():
                # One file may be named in two ways.
                mix[_absolute(source)] = mix.get(_absolute(source), 0.0) + weight
            raw["data"][split] = mix
        if Path(self.model.id).expanduser().is_dir():
            raw["model"]["id"] = str(Path(self.model.id).expanduser().resolve())
        return Recipe.model_validate(raw)

    def to_yaml(self) -> str:
        """The resolved recipe; reading it back gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _lasting_folder() -> Path:
    """What a relative storage is relative to: this folder, but not a submitted job's, which Ray deletes."""
    return Path.home() if "working_dir_files" in Path.cwd().parts else Path.cwd()


def _absolute(source: str) -> str:
    """A source that is a path made absolute; `scheme:...` stays."""
    if not source.strip() or re.match(r"[a-z0-9+-]{2,}:", source):
        return source
    return os.path.abspath(Path(source).expanduser())
