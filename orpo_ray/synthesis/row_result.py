"""What became of a row: its candidates, its pair, or why it has none."""

from __future__ import annotations

from dataclasses import dataclass, field

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError
from orpo_ray.synthesis.candidates import Candidate

PAIR = "pair"
"""The outcome of a row that became a pair; other rows have the reason why not."""


@dataclass
class RowResult:
    """What became of a row, filled in step by step."""

    row: PromptRow | BadRow
    outcome: str = PAIR
    detail: str = ""
    candidates: list[Candidate] = field(default_factory=list)
    left_out: int = 0
    """Answers that were drawn and are no candidates: empty, cut off or repeated."""
    pair: tuple[Candidate, Candidate] | None = None
    """The better and the worse answer."""

    def fail(self, error: RowError) -> None:
        """Note why the row has no pair."""
        self.outcome, self.detail, self.pair = error.reason, error.detail, None
