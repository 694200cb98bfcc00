"""Rows of every format with arbitrary values in them."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from orpo_ray.data import formats
from support.format_rows import ROWS

WORDS = st.sampled_from(["", " ", "x", "<image>", "\ud83d", "data:,", "user", "image", '{"question": "x"}']) | st.text()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.binary(max_size=4)
KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "bytes", "path", "rank", "Rating"])
JSON_LIKE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | WORDS, inner, max_size=3), max_leaves=8
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a row, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


@st.composite
def broken_rows(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A valid row with arbitrary values in up to three places, or in all columns."""
    columns = [column for column in formats._columns_of(name) if draw(st.booleans())]
    if draw(st.booleans()):
        return {column: draw(JSON_LIKE) for column in columns}
    row = copy.deepcopy(ROWS[name])
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(places(row)[1:] or [("id",)]))
        inner = row
        for key in above:
            inner = inner[key]
        inner[last] = draw(JSON_LIKE)
    return row
