"""Values for recipes, drawn from the recipe's own JSON schema: valid ones, and ones that no recipe should have."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from orpo_ray.config.field_types import RESERVED_NAMES
from orpo_ray.config.recipe import Recipe

SCHEMA = Recipe.model_json_schema()
GOOD_NAMES = st.sampled_from(["a", "run-2", "a.b_c", "a/trials/b"])
NAMES = GOOD_NAMES | GOOD_NAMES | st.sampled_from(["a" * 300, "../a", "", *(f"a/{name}" for name in RESERVED_NAMES)])
GOOD_TEXTS = st.sampled_from(
    ["a", "auto", "orpo.beta", "optim.learning_rate", "s3://b/k", "1e-4", "12e4567", "yes", "~"]
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    [
        *("1_0", "1e-4", "017", "0x10", "1:30", "2026-01-31", "yes", "~", "null", ".5", "-.5", "1.5e3", "9" * 400),
        *("~none/a", "a\0b", "a\nb", "\ud800", "x" * 5000),
    ]
)
NUMBERS = (
    st.integers(-2, 40)
    | st.floats()
    | st.sampled_from([1e308, 10**400, 2**63, -1, 0.1, 1e12, 1e-6, 0.5])
)  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def recipes() -> st.SearchStrategy[dict[str, Any]]:
    """Raw recipes: most fields are left out, most others are valid, and any can be anything."""
    return _values(SCHEMA, 0)


def _values(schema: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    good = _good_values(schema, depth)
    return _seldom().flatmap(lambda chosen: ANYTHING if chosen else good)


def _seldom() -> st.SearchStrategy[bool]:
    """True about once in 50 times. Hypothesis draws the ends of a range more often."""
    return st.integers(0, 50).map(lambda number: number == 23)


def _good_values(schema: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    if "$ref" in schema:
        return _good_values(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], depth)
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return st.one_of([_good_values(each, depth) for each in schema[several]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    if "type" not in schema:  # anything, such as a choice of a search
        return ANYTHING
    return _of_type(schema, depth)


def _of_type(schema: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    kind = schema["type"]
    if kind == "object" and "properties" in schema:
        return _section(schema, depth)
    if kind == "object":
        value = schema["additionalProperties"]  # True for a mapping to anything
        values = ANYTHING if value is True else _values(value, depth + 1)
        return st.dictionaries(GOOD_TEXTS | TEXTS, values, max_size=3)
    if kind == "array":
        return st.lists(_values(schema["items"], depth + 1), max_size=3)
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", -10))
        high = min(schema.get("maximum", schema.get("exclusiveMaximum", 100)), 100)
        whole = st.integers(low, int(high))
        return whole if kind == "integer" else st.floats(low, high) | whole
    simple = {"boolean": st.booleans(), "null": st.none(), "string": GOOD_TEXTS | GOOD_TEXTS | TEXTS}
    return NAMES if schema.get("title") == "Name" else simple[kind]


def _section(schema: dict[str, Any], depth: int) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: _values(field, depth + 1) for name, field in schema["properties"].items()}
    required = {name: fields.pop(name) for name in schema.get("required", ())}

    @st.composite
    def draw_section(draw: st.DrawFn) -> dict[str, Any]:
        chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True)) if fields else []
        section = {name: draw(value) for name, value in required.items()}
        section |= {name: draw(fields[name]) for name in chosen}
        return section | (draw(st.dictionaries(TEXTS, ANYTHING, max_size=1)) if draw(_seldom()) else {})

    return draw_section()
