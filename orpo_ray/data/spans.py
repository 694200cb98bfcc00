"""Where a pair lies in a packed row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PairSpan:
    """Position of a pair in a packed row: [start, chosen) prompt, [chosen, rejected) and [rejected, end) answers.

    A pair whose answers were given to different images has two prompts, and two spans with one answer each.
    """

    start: int
    chosen: int
    rejected: int
    end: int

    def moved(self, tokens: int) -> PairSpan:
        """The same pair further on in the row."""
        return PairSpan(self.start + tokens, self.chosen + tokens, self.rejected + tokens, self.end + tokens)

    @property
    def is_single(self) -> bool:
        """Whether the prompt has only one answer."""
        return self.rejected == self.end
