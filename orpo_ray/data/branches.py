"""The sequences of a packed row.

Tokens that several answers follow (a prompt, or an image and the text before it) are in the row once. The first of what
follows them continues their sequence. Each of the others is a branch of its own, with those tokens as its context.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[int, int]
"""Positions [first, second) of a row."""


@dataclass(frozen=True)
class Branch:
    """A causal sequence of a packed row: `context` from earlier in the row, then its own tokens [start, end).

    It ends with one answer. Before that, its own tokens are a prompt, or the part of one that its context lacks.
    """

    start: int
    answer: int
    """Where the answer begins; `start` if the whole prompt is context."""
    end: int
    context: tuple[Range, ...] = ()
    """Positions of the tokens before its own ones, in order. The row continues behind the last of them with a token of
    the same sequence."""

    def moved(self, tokens: int) -> Branch:
        """The same branch further on in the row."""
        context = tuple((first + tokens, end + tokens) for first, end in self.context)
        return Branch(self.start + tokens, self.answer + tokens, self.end + tokens, context)

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Positions of all tokens of the sequence, in order."""
        return (*self.context, (self.start, self.end))

    @property
    def context_tokens(self) -> int:
        """Tokens of the context."""
        return sum(end - first for first, end in self.context)
