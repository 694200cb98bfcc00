"""Columns of prepared data."""

from __future__ import annotations

import pytest

from orpo_ray.data.groups import Grouping
from orpo_ray.data_report.scan import clean_schema

BASE = clean_schema(Grouping()).names


@pytest.mark.parametrize(
    ("grouping", "added"),
    [
        (Grouping("lang", "task"), ["lang", "task"]), (Grouping("script"), []), (Grouping("script", "task"), ["task"]),
        (Grouping("id", "source"), []), (Grouping("same", "same"), ["same"]), (Grouping(None, "script"), ["script"]),
        (Grouping("script", "script"), ["script"]),
    ],
)  # fmt: skip
def test_columns_of_language_and_domain_are_kept(grouping: Grouping, added: list[str]) -> None:
    assert clean_schema(grouping).names == [*BASE, *added]
