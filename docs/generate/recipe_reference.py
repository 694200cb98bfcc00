"""The reference of every recipe field, from the pydantic models: type, bounds, default, documentation."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from html import escape
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from orpo_ray.config.recipe import Recipe

HEAD = """---
description: Every field of a recipe, with its type, bounds and default.
---

# Recipe reference

A recipe is a YAML file with the sections below. Only `name`, `model.id` and `data.train` are required. Unknown keys are
errors. Every field can be set on the command line: `orpo-ray train recipe.yaml optim.learning_rate=1e-5`.
`orpo-ray schema` prints the same as a JSON schema for your editor. The [recipes guide](../recipes.md) explains one
recipe line by line.

"""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def recipe_reference() -> str:
    """The page as Markdown: one heading per section, one per field, each with an anchor (`#optim.learning_rate`)."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    sections = [name for name, field in Recipe.model_fields.items() if _configs(field.annotation)]
    index = " · ".join(f"[{name}](#{name})" for name in sections)
    lines = [HEAD, f"Sections: {index}\n\n"]
    for name, field in Recipe.model_fields.items():
        if name not in sections:
            lines += _field(name, field, schema["properties"][name], definitions)
    for name in sections:
        for config in _configs(Recipe.model_fields[name].annotation):
            lines += _section(name, config, Recipe.model_fields[name], definitions, level=2)
    return "".join(lines)


def all_fields(config: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Dotted names of every field that is not itself a section."""
    for name, field in config.model_fields.items():
        nested = _configs(field.annotation)
        if not nested:
            yield prefix + name
        for inner in nested:
            yield from all_fields(inner, f"{prefix}{name}.")


def _section(
    path: str, config: type[BaseModel], field: FieldInfo, definitions: dict[str, Any], level: int
) -> list[str]:
    schema = definitions[config.__name__]
    texts = dict.fromkeys(map(_text, (config.__doc__ or "", field.description or "")))
    lines = [f"{'#' * level} `{path}` {{ #{path} }}\n\n", f"{' '.join(texts)}\n\n"]
    nested: list[str] = []
    for name, inner in config.model_fields.items():
        key = f"{path}.{name}"
        if configs := _configs(inner.annotation):
            for each in configs:
                nested += _section(key, each, inner, definitions, level=3)
        else:
            lines += _field(key, inner, schema["properties"][name], definitions)
    return lines + nested


def _field(key: str, field: FieldInfo, schema: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    facts = f'<span class="field-type">{_type(schema, definitions)}</span>'
    facts += f'<span class="field-default">{_default(field)}</span>'
    return [
        f"#### `{key}` {{ #{key} .field }}\n\n",
        f'<p class="field-facts">{facts}</p>\n\n',
        f"{_text(field.description or '')}\n\n",
    ]


def _configs(annotation: Any) -> list[type[BaseModel]]:
    """The section classes in an annotation such as `LoraConfig | None`; none for a plain field."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (dict, list):
        return []
    return [config for inner in typing.get_args(annotation) for config in _configs(inner)]


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words, as HTML."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        properties = definitions[name]["properties"].items()
        fields = ", ".join(f"{key}: {_type(value, definitions)}" for key, value in properties)
        return f"{{ {fields} }}"
    if "const" in schema:
        return _code(schema["const"])
    if "enum" in schema:
        return " | ".join(map(_code, schema["enum"]))
    if "anyOf" in schema or "oneOf" in schema:
        kinds = [_type(each, definitions) for each in schema.get("anyOf") or schema["oneOf"]]
        return " | ".join(dict.fromkeys(kinds))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), definitions)}"
    if schema.get("type") == "object":
        return _mapping(schema, definitions)
    name = {"string": "string", "integer": "integer", "number": "number", "boolean": "bool", "null": "null"}
    bounds = "".join(f" {sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema)
    return escape(name[schema["type"]] + bounds, quote=False)


def _mapping(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    keys = _type(schema["propertyNames"], definitions) if "propertyNames" in schema else "string"
    return f"mapping of {keys} to {_type(schema.get('additionalProperties', {}), definitions)}"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "<strong>required</strong>"
    if isinstance(default, dict):
        default = {key: value.model_dump() if isinstance(value, BaseModel) else value for key, value in default.items()}
    return f"default {_code(default)}"


def _code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"<code>{escape(text)}</code>"


def _text(docstring: str) -> str:
    return " ".join(docstring.split())
