"""Rows that a server or a judge refuses. One is a row without a pair; a part of nothing else ends the command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orpo_ray.errors import RowError, UserError

FEWEST_ROWS = 4
"""So many refused rows without an answered one are no accident. The last part of a set may have fewer rows."""


def check_some_are_taken(asked: Sequence[Any], who: str, field: str, value: str, fix: str) -> None:
    """Raise UserError if every row of a part is refused, with the reason for the first.

    Args:
        asked: what came of each row that was asked about; a RowError for a refused one.
        who: what refuses, for the message.
        field: the recipe field that names it.
        value: what the field says.
        fix: what to do.
    """
    refused = [each for each in asked if isinstance(each, RowError)]
    if len(refused) < FEWEST_ROWS or len(refused) < len(asked):
        return
    problem = f"the {who} refuses all {len(refused)} rows of a part; the first: {refused[0].detail}"
    raise UserError(problem, field=field, value=value, fix=fix)
