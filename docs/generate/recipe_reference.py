"""The reference of every recipe field, from the pydantic models: type, bounds, default, documentation."""

from __future__ import annotations

import json
import typing
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

A recipe is a YAML file with the sections below. Only `name`, `model.id` and `data.train` are required. Unknown fields
are errors. Every field can be set on the command line: `orpo-ray train recipe.yaml optim.learning_rate=1e-5`.
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
        lines += _sections(name, Recipe.model_fields[name], definitions, level=2)
    return "".join(lines)


def _sections(path: str, field: FieldInfo, definitions: dict[str, Any], level: int) -> list[str]:
    """The section of a field; if the recipe chooses one of several kinds by `name`, a section for each kind."""
    configs = _configs(field.annotation)
    heading = f"{'#' * level} `{path}` {{ #{path} }}\n\n"
    if len(configs) == 1:
        texts = dict.fromkeys(map(_text, (configs[0].__doc__ or "", field.description or "")))
        return [heading, f"{' '.join(texts)}\n\n", *_fields(path, configs[0], definitions, level)]
    kinds = {typing.get_args(config.model_fields["name"].annotation)[0]: config for config in configs}
    default = field.get_default(call_default_factory=True).name
    lines = [heading, f"{_text(field.description or '')}\n\n"]
    lines += _entry(f"{path}.name", " | ".join(map(_code, kinds)), f"default {_code(default)}", "Which kind.")
    anchored: set[str] = set()
    for kind, config in kinds.items():
        lines.append(
            f"{'#' * (level + 1)} `{path}.name: {kind}` {{ #{path}-{kind} }}\n\n{_text(config.__doc__ or '')}\n\n"
        )
        fields = _fields(path, config, definitions, level + 1, without=("name",))
        # Kinds may have fields of the same name; the plain anchor is the first one's.
        for name in anchored & set(config.model_fields):
            fields = [line.replace(f"#{path}.{name} .field", f"#{path}.{kind}.{name} .field") for line in fields]
        anchored |= set(config.model_fields)
        lines += fields
    return lines


def _fields(
    path: str, config: type[BaseModel], definitions: dict[str, Any], level: int, without: tuple[str, ...] = ()
) -> list[str]:
    schema = definitions[config.__name__]
    plain: list[str] = []
    nested: list[str] = []
    for name, field in config.model_fields.items():
        if name in without:
            continue
        if _configs(field.annotation):
            nested += _sections(f"{path}.{name}", field, definitions, level + 1)
        else:
            plain += _field(f"{path}.{name}", field, schema["properties"][name], definitions)
    return plain + nested


def _field(key: str, field: FieldInfo, schema: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    return _entry(key, _type(schema, definitions), _default(field), _text(field.description or ""))


def _entry(key: str, kind: str, default: str, text: str) -> list[str]:
    facts = f'<span class="field-type">{kind}</span><span class="field-default">{default}</span>'
    return [f"#### `{key}` {{ #{key} .field }}\n\n", f'<p class="field-facts">{facts}</p>\n\n', f"{text}\n\n"]


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
    if "type" not in schema:
        return "anything"
    name = {"string": "string", "integer": "integer", "number": "number", "boolean": "bool", "null": "null"}
    bounds = ", ".join(f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema)
    return escape(f"{name[schema['type']]} {bounds}".strip(), quote=False)


def _mapping(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    keys = _type(schema["propertyNames"], definitions) if "propertyNames" in schema else "string"
    values = schema.get("additionalProperties", True)
    return f"mapping of {keys} to {_type({} if values is True else values, definitions)}"


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
