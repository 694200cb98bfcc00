"""The typed recipe: YAML plus dotted overrides become one validated `Recipe`. Imports neither torch nor ray.

The fields are in `sections.py`; `Recipe.model_json_schema()` is the schema for editors.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from orpo_ray.compatible import refusals
from orpo_ray.errors import UserError
from orpo_ray.sections import (
    CheckpointSection,
    DataSection,
    DeepspeedSection,
    EvalSection,
    ModelSection,
    OptimSection,
    OrpoSection,
    ScalingSection,
    Section,
    TrackingSection,
    TuneSection,
)


class Recipe(Section):
    """Everything that a run is, in one file."""

    name: str = Field(min_length=1)
    """Name of the run and of its folder."""
    model: ModelSection
    data: DataSection
    orpo: OrpoSection = Field(default_factory=OrpoSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    deepspeed: DeepspeedSection = Field(default_factory=DeepspeedSection)
    scaling: ScalingSection = Field(default_factory=ScalingSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    tune: TuneSection = Field(default_factory=TuneSection)

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
        if self.data.eval and self.data.eval_share:
            raise ValueError("data.eval and data.eval_share are both given: held-out pairs come from one of them")
        if refused := refusals(self):
            raise ValueError("\n  - ".join(refused))
        return self

    @property
    def has_held_out(self) -> bool:
        """Whether there are pairs to evaluate on."""
        return bool(self.data.eval or self.data.eval_share)

    @property
    def run_uri(self) -> str:
        """The run's folder, `<checkpoint.storage>/<name>`: an absolute path, or a URI."""
        storage = self.checkpoint.storage.rstrip("/")
        if "://" not in storage:
            storage = str((_lasting_folder() / Path(storage).expanduser()).resolve())
        return f"{storage}/{self.name}"

    def anchored(self) -> Recipe:
        """The same recipe with every local path absolute: workers and trials run in folders of their own."""
        raw = self.model_dump(mode="json")
        raw["checkpoint"]["storage"] = self.run_uri.removesuffix(f"/{self.name}")
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


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides (values are YAML). Raises UserError."""
    raw = read_mapping(Path(path))
    apply_overrides(raw, overrides)
    return parse_recipe(raw, source=str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """A recipe file's raw mapping. Raises UserError if it is not one."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such recipe", field=str(path), fix="give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", field=str(path)) from None
    except yaml.YAMLError as error:
        raise UserError(f"is not valid YAML: {error}", field=str(path)) from None
    if not isinstance(raw, dict):
        raise UserError("a recipe is a mapping of sections", field=str(path), value=type(raw).__name__)
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `section.key=value` overrides into a recipe's mapping. Raises UserError."""
    for override in overrides:
        _apply_override(raw, override)


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe given as a mapping. Raises one UserError that names every wrong field."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(item)) for item in error.errors()]
        body = lines[0] if len(lines) == 1 else f"{len(lines)} problems\n" + "\n".join(f"  - {line}" for line in lines)
        raise UserError(body, field=source) from None


def _lasting_folder() -> Path:
    """What a relative storage is relative to: this folder, but not a submitted job's, which Ray deletes."""
    return Path.home() if "working_dir_files" in Path.cwd().parts else Path.cwd()


def _absolute(source: str) -> str:
    """A source that is a path made absolute; `scheme:...` stays."""
    if not source.strip() or re.match(r"[a-z0-9+-]{2,}:", source):
        return source
    return os.path.abspath(Path(source).expanduser())


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key:
        raise UserError("an override is section.key=value", field="command line", value=override)
    try:
        value = _number_like(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"the value is not valid YAML: {error}", field=key, value=text) from None
    *parents, last = key.split(".")
    here = raw
    for parent in parents:
        child = here.get(parent)
        if child is None:
            child = here[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"'{parent}' is a value, not a section", field=key, value=child)
        here = child
    here[last] = value


def _number_like(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; users mean the number."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _explain(item: dict[str, Any]) -> str:
    """One line for one of pydantic's findings: field, what is wrong, the value, the nearest known key."""
    location = [str(part) for part in item["loc"] if part != "[key]"]
    field, kind, context = ".".join(location), item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys here: {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    if kind == "missing":
        return f"{field}: is required"
    message = context["error"] if kind == "value_error" else item["msg"]
    if not field:  # a combination of fields, which the message names
        return str(message)
    value = item["input"]
    shown = f" (found {value!r})" if not isinstance(value, dict | BaseModel) else ""
    return f"{field}: {message}{shown}"


def _known_keys(location: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(part)
        if field is None:
            break
        for candidate in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return list(section.model_fields)
