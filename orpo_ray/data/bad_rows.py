"""When rows that cannot be used end a run: what a recipe says of them, for training and for what is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import BAD_ROWS_FILE

BAD_ROWS_BEFORE_JUDGING = 10
BAD_ROWS_SHOWN = 3
SHOWN_CHARACTERS = 200


class TooManyBadRows(UserError):
    """The share of rows that cannot be used exceeds `data.max_bad_fraction`, or any is one too many."""


def refuse_rows(recipe: Recipe, records: Sequence[Mapping[str, Any]]) -> None:
    """Raise TooManyBadRows at a row that the recipe does not allow to be skipped. records: as in `bad_rows.jsonl`."""
    data = recipe.data
    for record in records:
        too_long = record["reason"] == "too_long" and data.on_too_long == "error"
        if too_long or data.on_bad_row == "error":
            field = "data.on_too_long" if too_long else "data.on_bad_row"
            raise TooManyBadRows(
                f"this row cannot be used: {_shown(record)}",
                field=record["source"],
                value=record["id"],
                fix=f"mend the row, or set {field} to skip",
            )


def check_bad_fraction(recipe: Recipe, bad: int, seen: int, first: Sequence[Mapping[str, Any]], at_end: bool) -> None:
    """Raise TooManyBadRows where more of the rows seen are bad than allowed. first: some of them, to be shown."""
    allowed = recipe.data.max_bad_fraction
    if bad > allowed * seen and (at_end or bad >= BAD_ROWS_BEFORE_JUDGING):
        shown = "".join(f"\n  {record['source']}: {_shown(record)}" for record in first[:BAD_ROWS_SHOWN])
        raise TooManyBadRows(
            f"{bad} of {seen} rows cannot be used ({bad / seen:.0%}; at most {allowed:.0%} are allowed)" + shown,
            field="data.max_bad_fraction",
            fix=f"see {recipe.run_uri}/{BAD_ROWS_FILE} for each row's reason; orpo-ray data check shows all of them",
        )


def _shown(record: Mapping[str, Any]) -> str:
    text = f"{record['reason']}: {record['detail']}"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
