"""The errors that this package raises on purpose. All survive pickling, since Ray ships them between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def preview(value: Any, at_most: int = 80) -> str:
    """Format a value for an error message, in at most `at_most` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more than 4,300 digits, values that are nested too deeply
        text = f"{type(value).__name__}, too large to show"
    return text if len(text) <= at_most else text[: at_most - 3] + "..."


def some_of(names: Sequence[str], at_most: int = 3) -> str:
    """List the first names, and say how many more there are."""
    more = f" and {len(names) - at_most:,} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


class OrpoRayError(Exception):
    """Base class of all errors of this package.

    Attributes:
        title: word before the message on the console.
        exit_code: of a command that ends with this error.
    """

    title: str = "failed"
    exit_code: int = 1


class UserError(OrpoRayError):
    """The user's input is wrong. The command line prints the message without a traceback and exits with code 2.

    Args:
        problem: what is wrong.
        field: where: a recipe field, a file or a row id.
        value: the value found there. The message shows the start of a long one.
        fix: what to do.
    """

    title = "error"
    exit_code = 2

    def __init__(self, problem: str, *, field: str | None = None, value: Any = None, fix: str | None = None) -> None:
        self.problem, self.field, self.value, self.fix = problem, field, value, fix
        where = f"{field}: " if field else ""
        found = f" (found {preview(value, 200)})" if value is not None else ""
        then = f"\n  fix: {fix}" if fix else ""
        super().__init__(f"{where}{problem}{found}{then}")

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"field": self.field, "value": self.value, "fix": self.fix}
        return (_rebuild_user_error, (type(self), self.problem, state))


class RowError(OrpoRayError):
    """Raised while one row is read or encoded. The caller turns it into a `BadRow`; it never ends a run by itself.

    Args:
        reason: a short stable word for counting, for example `unreadable_image`.
        detail: what was found, for the user.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def _rebuild_user_error(cls: type[UserError], problem: str, state: dict[str, Any]) -> UserError:
    return cls(problem, **state)
