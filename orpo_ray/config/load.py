"""Load a recipe: YAML plus dotted overrides become a validated `Recipe`, or one error that names every wrong field."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from orpo_ray.config.objectives import OBJECTIVES, ObjectiveOptions
from orpo_ray.config.recipe import Recipe
from orpo_ray.config.yaml_text import MAX_DEPTH, parse_yaml, read_text
from orpo_ray.errors import UserError, preview

MAX_LINES = 20  # wrong fields that one error names
MAX_KEY = 100  # characters of a key in a message
# What other trainers call a field, where the names are not alike.
ELSEWHERE = {
    "lr": "learning_rate", "num_train_epochs": "epochs", "num_epochs": "epochs", "batch_size": "pairs_per_step",
    "train_batch_size": "pairs_per_step", "per_device_train_batch_size": "pairs_per_step", "warmup_steps": "warmup",
    "warmup_ratio": "warmup", "lr_scheduler_type": "schedule", "lr_scheduler": "schedule", "scheduler": "schedule",
    "max_seq_length": "max_length", "cutoff_len": "max_length", "sequence_len": "max_length",
    "model_name_or_path": "id", "name_or_path": "id", "base_model": "id", "rank": "r", "lora_rank": "r", "lora_r": "r",
    "lora_alpha": "alpha", "lora_dropout": "dropout", "num_gpus": "num_workers", "output_dir": "storage",
    "save_steps": "every_steps", "eval_steps": "every_steps", "save_total_limit": "keep", "pref_beta": "beta",
    "attn_implementation": "attention", "torch_dtype": "dtype", "val_size": "eval_fraction",
    "test_size": "eval_fraction",
}  # fmt: skip
_FIX_NAME = "correct the name of the field; orpo-ray schema lists all fields"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: a YAML file.
        overrides: `FIELD=VALUE` strings; the values are YAML.

    Raises:
        UserError: the file or an override cannot be read, or a field is wrong. Names all wrong fields.
    """
    raw = read_mapping(Path(path))
    apply_overrides(raw, overrides)
    return parse_recipe(raw, source=str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a recipe file as a mapping, without validation.

    Raises:
        UserError: the file is missing, unreadable, or not a YAML mapping.
    """
    raw = parse_yaml(read_text(path), field=str(path))
    if not isinstance(raw, dict):
        raise UserError(
            "a recipe must be a mapping of sections",
            field=str(path),
            value=type(raw).__name__,
            fix="see recipes/quickstart.yaml for an example",
        )
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `FIELD=VALUE` overrides to a raw recipe, in place. Raises UserError."""
    for override in overrides:
        _apply_override(raw, override)


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a raw recipe.

    Args:
        raw: the recipe as a mapping.
        source: name of the file, for error messages.

    Raises:
        UserError: one error that names all wrong fields.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        found = error.errors()
        lines = [_describe_error(dict(item)) for item in found[:MAX_LINES]]
        lines += [f"and {len(found) - MAX_LINES} more"] if len(found) > MAX_LINES else []
        body = lines[0] if len(lines) == 1 else f"{len(found)} problems\n" + "\n".join(f"  - {line}" for line in lines)
        raise UserError(body, field=source) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key:
        raise UserError(
            "an override must have the form FIELD=VALUE",
            field="command line",
            value=override,
            fix="for example optim.learning_rate=1e-5",
        )
    if key.count(".") >= MAX_DEPTH:
        raise UserError("no field has a name of so many parts", field="command line", value=key, fix=_FIX_NAME)
    set_field(raw, key, parse_yaml(text, field=preview(key).strip("'")))


def set_field(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a field of a raw recipe, in place.

    Args:
        raw: the recipe as a mapping.
        key: the field, such as `optim.learning_rate`. Sections that are missing are made.
        value: its value.

    Raises:
        UserError: a part of the key is no section.
    """
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        child = section.get(parent)
        if parent == "objective" and isinstance(child, str):
            child = section[parent] = {"name": child}  # `objective: cpo` is short for this
        if child is None:
            child = section[parent] = {}
        if not isinstance(child, dict):
            raise UserError(
                f"'{parent}' holds a value, so it cannot have keys",
                field=key,
                value=child,
                fix=_FIX_NAME,
            )
        section = child
    section[last] = value


def _describe_error(item: dict[str, Any]) -> str:
    """Describe one pydantic error in a line: the field, what is wrong, the value, the nearest known field."""
    location = [_printable(str(key)[:MAX_KEY]) for key in item["loc"] if key != "[key]"]
    section = _section(location[:-1])
    if location[0:1] == ["objective"] and len(location) > 2:
        del location[1]  # pydantic puts the objective's name here, which is not part of the key
    field, kind, context = ".".join(location), item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        known = list(section.model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6)
        if (other := ELSEWHERE.get(location[-1])) in known:
            near = [other]
        hint = f"did you mean '{near[0]}'?" if near else f"fields here: {', '.join(known)}"
        return f"{field}: unknown field; {hint}"
    if kind == "missing":
        return f"{field}: this field is required"
    message = context["error"] if kind == "value_error" else item["msg"]
    if not field:  # a combination of fields; the message names them
        return str(message)
    value = item["input"]
    shown = f" (found {preview(value, 200)})" if not isinstance(value, dict | BaseModel) else ""
    return f"{field}: {message}{shown}"


def _printable(key: str) -> str:
    """Replace control characters and lone surrogates."""
    return "".join(character if character.isprintable() else "\ufffd" for character in key)


def _section(location: list[str]) -> type[BaseModel]:
    """The class of the section at a location."""
    section: type[BaseModel] = Recipe
    for key in location:
        if key in OBJECTIVES and issubclass(section, ObjectiveOptions):
            section = OBJECTIVES[key]
            continue
        field = section.model_fields.get(key)
        if field is None:
            break
        for candidate in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return section
