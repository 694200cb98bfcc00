"""Arbitrary rows are a pair or a bad row."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ray.config.field_types import FORMATS
from orpo_ray.errors import RowError
from support.format_rows import IMAGE, pair_of
from support.row_values import broken_rows


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_row_is_a_pair_or_a_bad_row(name: str, data: st.DataObject) -> None:
    row = data.draw(broken_rows(name))
    try:
        pair = pair_of(row, name)
    except RowError:
        return
    parts = [part for message in pair.prompt for part in message["content"]]
    assert sum(part == IMAGE for part in parts) == len(pair.images)
    assert all(isinstance(part["text"], str) for part in parts if part != IMAGE)
    assert pair.chosen.strip()
    assert pair.rejected.strip()
    assert pair.chosen != pair.rejected or pair.rejected_images
    json.dumps([pair.prompt, pair.chosen, pair.rejected], ensure_ascii=False).encode()
