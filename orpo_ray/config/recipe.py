"""The validated recipe of a run. Its sections are in `schema.py`; imports neither torch nor Ray.

`Recipe.model_json_schema()` is the schema for editors (`orpo-ray schema`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from orpo_ray.config.field_types import OtherImage, RunName
from orpo_ray.config.objectives import Objective, OrpoConfig, OrpoObjective, check_search, default_search
from orpo_ray.config.results import EvalConfig, TrackingConfig
from orpo_ray.config.rules import find_conflicts
from orpo_ray.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DeepspeedConfig,
    ModelConfig,
    OptimConfig,
    ScalingConfig,
)
from orpo_ray.config.synthesis import SynthesizeConfig
from orpo_ray.config.tune_schema import SearchRange, TuneConfig
from orpo_ray.errors import UserError


class Recipe(Config):
    """All settings of a run."""

    name: RunName = Field(min_length=1)
    """Name of the run: letters, digits, `.`, `_` and `-`. The run is stored in `<checkpoint.storage>/<name>`."""
    model: ModelConfig
    """The vision-language model to train."""
    data: DataConfig
    """Sources of the preference pairs."""
    objective: Objective = Field(default_factory=OrpoObjective)
    """Loss to train with: a name, or a mapping of `name` and options. ORPO's options are in the section `orpo`."""
    orpo: OrpoConfig = Field(default_factory=OrpoConfig)
    """Options of ORPO. Every other objective has its options under `objective`."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimizer, learning-rate schedule, and size of a step."""
    deepspeed: DeepspeedConfig = Field(default_factory=DeepspeedConfig)
    """ZeRO stage and settings of DeepSpeed. Stage 0, the default, runs on PyTorch without DeepSpeed."""
    scaling: ScalingConfig = Field(default_factory=ScalingConfig)
    """Number of workers, and the resources of each."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Where runs are stored, and how often checkpoints are saved."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Evaluation on the held-out pairs."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """Trackers that receive metrics."""
    tune: TuneConfig = Field(default_factory=TuneConfig)
    """Hyperparameter search."""
    synthesize: SynthesizeConfig = Field(default_factory=SynthesizeConfig)
    """Preference pairs made from images and prompts."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Recipe:
        self._check_workers()
        if self.eval.every_steps and not self.has_held_out:
            raise ValueError(
                "eval.every_steps is set but there are no held-out pairs; set data.eval or data.eval_fraction"
            )
        if self.eval.generate and not self.has_held_out:
            raise ValueError(
                "eval.generate is set but there are no held-out pairs; set data.eval or data.eval_fraction"
            )
        if self.eval.generate and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "eval.generate needs whole weights on each worker, and deepspeed.zero_stage 3 divides them; set "
                "eval.generate=0, and after the run: orpo-ray evaluate RUN --generate N"
            )
        if self.data.eval and self.data.eval_fraction:
            raise ValueError("data.eval and data.eval_fraction are both set; set data.eval_fraction=0 or data.eval={}")
        if conflicts := find_conflicts(self):
            raise ValueError("\n  - ".join(conflicts))
        if self.objective.section != "orpo" and (unused := sorted(self.orpo.model_fields_set)):
            # Refused even at its default: whoever sets an option expects an effect.
            raise ValueError(
                f"orpo.{unused[0]} is set, but the objective is {self.objective.title}; set its options under "
                "objective, and remove the section orpo (on the command line: orpo={})"
            )
        return self

    def _check_workers(self) -> None:
        scaling, together = self.scaling, self.scaling.sequence_parallel
        for workers in (scaling.min_workers, scaling.max_workers):
            if workers % together:
                raise ValueError(
                    f"scaling.num_workers ({workers}) is no multiple of scaling.sequence_parallel ({together}), "
                    "how many workers compute pairs together; change one of them"
                )
        if scaling.max_workers // together > self.optim.pairs_per_step:
            raise ValueError(
                f"scaling.num_workers ({scaling.max_workers}) exceeds optim.pairs_per_step "
                f"({self.optim.pairs_per_step}), so some workers would get no pair; lower it or raise pairs_per_step"
            )
        if together > 1 and self.model.attention == "concatenated":
            raise ValueError(
                f"scaling.sequence_parallel ({together}) divides the row of a shared prefix, and model.attention is "
                "concatenated; set it to auto, or scaling.sequence_parallel to 1"
            )

    @model_serializer(mode="wrap")
    def _without_unused_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        raw: dict[str, Any] = handler(self)
        if self.objective.section != "orpo":
            raw.pop("orpo", None)  # ORPO's options would be refused when read back
        return raw

    @property
    def objective_options(self) -> dict[str, Any]:
        """The options of the objective by name, from its section."""
        section: Config = getattr(self, self.objective.section)
        return section.model_dump(exclude={"name"})

    @property
    def samples(self) -> str:
        """What steps and epochs count, in words: pairs, or rows that may give several of them."""
        return "pairs" if self.data.pairs_from_ranking == "best_worst" else "rows"

    @property
    def other_image(self) -> OtherImage | None:
        """Which images the chosen answers are contrasted with; None without an image preference."""
        uses_orpo = self.objective.section == "orpo"
        return self.orpo.other_image if uses_orpo and self.orpo.image_beta else None

    @property
    def search(self) -> dict[str, SearchRange]:
        """What `orpo-ray tune` searches: a recipe key -> its values. `sweep/space.py` checks the values.

        Checked here and not when the recipe is read, so that other commands can switch the objective of a recipe that
        has a search.

        Raises:
            UserError: the search names a field that cannot be searched, or an option or a metric that the objective
                does not have.
        """
        check_search(self.tune, self.objective)
        return self.tune.search or default_search(self.objective)

    @property
    def has_held_out(self) -> bool:
        """Whether the recipe has pairs to evaluate on."""
        return bool(self.data.eval or self.data.eval_fraction)

    @property
    def run_uri(self) -> str:
        """The run folder, `<checkpoint.storage>/<name>`, as an absolute path or a URI."""
        storage = self.checkpoint.storage.rstrip("/")
        if "://" not in storage:
            storage = str((_base_folder() / os.path.expanduser(storage)).resolve())
        return f"{storage}/{self.name}"

    def with_absolute_paths(self) -> Recipe:
        """Return a copy with absolute local paths, since workers and trials run in other working directories.

        Raises:
            UserError: `model.id` is a path without a folder.
        """
        raw = self.model_dump(mode="json")
        raw["checkpoint"]["storage"] = self.run_uri.removesuffix(f"/{self.name}")
        if self.model.vision_cache is not None:
            raw["model"]["vision_cache"] = _absolute(self.model.vision_cache)
        if self.checkpoint.scratch is not None:
            raw["checkpoint"]["scratch"] = _absolute(self.checkpoint.scratch)
        if self.data.image_root is not None:
            raw["data"]["image_root"] = _absolute(self.data.image_root)
        for section, field in (("data", "train"), ("data", "eval"), ("synthesize", "source")):
            sources: dict[str, float] = {}
            for source, weight in raw[section][field].items():
                # Two spellings of one path (`a.jsonl`, `./a.jsonl`) become one source.
                sources[_absolute(source)] = sources.get(_absolute(source), 0.0) + weight
            raw[section][field] = sources
        if self.synthesize.image_root is not None:
            raw["synthesize"]["image_root"] = _absolute(self.synthesize.image_root)
        if self.synthesize.model is not None:
            raw["synthesize"]["model"] = _absolute_folder(self.synthesize.model)
        if self.synthesize.judge.url is None:
            raw["synthesize"]["judge"]["model"] = _absolute_folder(self.synthesize.judge.model)
        raw["model"]["id"] = _absolute_folder(self.model.id)
        if self.model.id.startswith((".", "/", "~")) and not os.path.isdir(raw["model"]["id"]):
            fix = "give a model's folder, or its name on the Hugging Face hub"
            raise UserError("no such folder", field="model.id", value=self.model.id, fix=fix)
        return Recipe.model_validate(raw)

    def to_yaml(self) -> str:
        """Return all fields as YAML. Parsing the result gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _base_folder() -> Path:
    """Return the folder that relative storage paths start from.

    This is the working directory, except in a submitted Ray job: Ray deletes that directory with the job.
    """
    return Path.home() if "working_dir_files" in Path.cwd().parts else Path.cwd()


def _absolute_folder(name: str) -> str:
    """Make a name absolute if it is that of a folder here, and not a model of the hub."""
    found = Path(os.path.expanduser(name))
    return str(found.resolve()) if name and found.is_dir() else name


def _absolute(source: str) -> str:
    """Make a source that is a path absolute; return `scheme:...` unchanged."""
    if not source.strip() or re.match(r"[a-z0-9+-]{2,}:", source):
        return source
    return os.path.abspath(os.path.expanduser(source))
