"""Rows that cannot be used: their one type, and when a recipe lets them end a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.groups import KINDS
from orpo_ray.errors import RowError, UserError
from orpo_ray.storage.run_folder import BAD_ROWS_FILE

BAD_ROWS_BEFORE_JUDGING = 10
BAD_ROWS_SHOWN = 3
SHOWN_CHARACTERS = 200


NO_SAMPLE = -1  # the sample index of a row that has no place in a training order yet


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on."""

    sample_index: int
    """Place in the training order; NO_SAMPLE where the row has none."""
    id: str
    """The row's own id, or its source."""
    source: str
    """File and position, for example `pairs.jsonl:line 7`."""
    reason: str
    """A short stable word for counting, for example `unreadable_image`."""
    detail: str
    """Description of the problem."""
    language: str | None = None
    """As `data.language` names it, where the row could be read."""
    domain: str | None = None
    """The same by `data.domain`."""

    @classmethod
    def of(cls, error: RowError, sample_index: int, row_id: str, source: str) -> BadRow:
        """Attach an error to its row."""
        return cls(sample_index, row_id, source, error.reason, error.detail)

    def as_line(self) -> dict[str, str]:
        """Return the line of `bad_rows.jsonl`: id, source, reason, detail, and language and domain if there are any."""
        return {name: value for name, value in asdict(self).items() if name != "sample_index" and value is not None}


# How Arrow tables carry a BadRow: `asdict` in, `BadRow(**row)` out.
BAD_ROW_TYPE = pa.struct(
    [("sample_index", pa.int64()), *((name, pa.string()) for name in ("id", "source", "reason", "detail", *KINDS))]
)


class TooManyBadRows(UserError):
    """More rows are bad than `data.max_bad_fraction` allows, or one is bad where none may be."""


def refuse_rows(recipe: Recipe, rows: Sequence[BadRow]) -> None:
    """Raise TooManyBadRows for the first row that the recipe does not allow to be skipped."""
    data = recipe.data
    for row in rows:
        too_long = row.reason == "too_long" and data.on_too_long == "error"
        if too_long or data.on_bad_row == "error":
            field = "data.on_too_long" if too_long else "data.on_bad_row"
            raise TooManyBadRows(
                f"this row cannot be used: {_shown(row)}",
                field=row.source,
                value=row.id,
                fix=f"correct the row, or set {field} to skip",
            )


def check_bad_fraction(recipe: Recipe, bad: int, seen: int, first: Sequence[BadRow], at_end: bool) -> None:
    """Raise TooManyBadRows if more than `data.max_bad_fraction` of the rows seen so far are bad.

    Args:
        recipe: names the allowed fraction and the run folder.
        bad: number of bad rows.
        seen: number of rows, bad ones included.
        first: a few bad rows for the message.
        at_end: judge any number of bad rows; before the end at least BAD_ROWS_BEFORE_JUDGING are needed.
    """
    allowed = recipe.data.max_bad_fraction
    if bad > allowed * seen and (at_end or bad >= BAD_ROWS_BEFORE_JUDGING):
        shown = "".join(f"\n  {row.source}: {_shown(row)}" for row in first[:BAD_ROWS_SHOWN])
        raise TooManyBadRows(
            f"{bad} of {seen} rows cannot be used ({bad / seen:.0%}; at most {allowed:.0%} are allowed)" + shown,
            field="data.max_bad_fraction",
            fix=f"read each row's reason in {recipe.run_uri}/{BAD_ROWS_FILE}, run orpo-ray data check, or raise "
            "data.max_bad_fraction",
        )


def _shown(row: BadRow) -> str:
    text = f"{row.reason}: {row.detail}"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
