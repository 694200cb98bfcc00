"""Packed rows of trees, and a second, simple statement of which of their tokens attend to which."""

from __future__ import annotations

from dataclasses import dataclass

from orpo_ray.data.branches import Branch, Range

Question = tuple[int, list[int]]
"""Tokens of the rest of a prompt, and of the answers to it."""
Tree = tuple[int, list[Question]]
"""Tokens that several prompts begin with, and what follows them. A single prompt may have a rest of 0 tokens."""


@dataclass(frozen=True)
class Token:
    """A token of a row."""

    path: tuple[int, ...]
    """Numbers of the tree, the question and the answer that it is in; what it is not in is left out."""
    place: int
    """Index in its own sequence."""

    @property
    def in_prompt(self) -> bool:
        return len(self.path) < 3

    def follows(self, other: Token) -> bool:
        """Whether the other token is in every sequence that this one is in."""
        return self.path[: len(other.path)] == other.path


def row_of(trees: list[Tree]) -> tuple[list[Branch], list[Token]]:
    """Return the branches of a row, and its tokens."""
    branches: list[Branch] = []
    row: list[Token] = []

    def extend(path: tuple[int, ...], place: int, count: int) -> Range:
        first = len(row)
        row.extend(Token(path, place + index) for index in range(count))
        return first, len(row)

    for number, (prefix, questions) in enumerate(trees):
        root = extend((number,), 0, prefix)
        for which, (question, answers) in enumerate(questions):
            rest = extend((number, which), prefix, question)
            before = ((root[0], rest[1]),) if which == 0 else (root, rest)
            for index, answer in enumerate(answers):
                first, end = extend((number, which, index), prefix + question, answer)
                start, context = (first, before)
                if index == 0:
                    start, context = (root[0], ()) if which == 0 else (rest[0], (root,))
                branches.append(Branch(start, first, end, context))
    return branches, row
