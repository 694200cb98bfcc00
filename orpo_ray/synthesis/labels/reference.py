"""Scores by agreement with the row's answer: 1 for the same words, otherwise the F1 of the words they share."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError
from orpo_ray.synthesis.candidates import Candidate
from orpo_ray.synthesis.labels.base import Answered, Tools

# In scripts without spaces, a character is what comes nearest to a word.
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣฀-๿]|[^\W_]+(?:['’][^\W_]+)*")  # noqa: RUF001
_ARTICLES = {"a", "an", "the"}


class Reference:
    """A `Labeller` for rows that give an answer."""

    def __init__(self, tools: Tools) -> None:
        self._candidates = tools.recipe.synthesize.candidates

    def check(self) -> None:
        """Nothing needs a check."""

    def draws(self, row: PromptRow) -> int:
        """Return the number of candidates; none for a row without an answer."""
        return 0 if row.answer is None else self._candidates

    def score(self, part: Sequence[Answered]) -> list[list[Candidate] | RowError]:
        """Score candidates by agreement."""
        return [
            RowError("no_answer", "the row gives no answer to compare with")
            if each.row.answer is None
            else [replace(one, score=agreement(one.text, each.row.answer)) for one in each.candidates]
            for each in part
        ]


def agreement(text: str, answer: str) -> float:
    """Return how far two answers agree, from 0 to 1: the F1 of their words, without case and English articles."""
    found, wanted = _words(text), _words(answer)
    common = sum((found & wanted).values())
    return 2 * common / (found.total() + wanted.total()) if common else float(text == answer)


def _words(text: str) -> Counter[str]:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return Counter(words if set(words) <= _ARTICLES else [word for word in words if word not in _ARTICLES])
