"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "fix"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """Name of what was checked."""
    status: Status
    """`ok`; `warning`: a run may work; `fix`: a run would fail, or the cluster is open to strangers."""
    value: str
    """What was found."""
    fix: str | None = None
    """What to do, unless all is well."""


def fine(check: str, value: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(check, "ok", value)
