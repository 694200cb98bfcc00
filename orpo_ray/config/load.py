"""YAML plus dotted overrides -> a validated `Recipe`, or one error that names every wrong field."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError


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
