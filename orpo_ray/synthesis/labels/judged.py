"""Scores by a vision-language judge: each two candidates of a row are compared in both positions.

A candidate's score is the fraction of its comparisons that it wins, a tie being half of one. n candidates take
n (n - 1) questions to the judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError
from orpo_ray.evaluation.chat_server import sent_image
from orpo_ray.evaluation.generation import text_of
from orpo_ray.evaluation.judge import POINTS, TAKES_QUESTIONS, Judge, ServerJudge, Verdict, compare_twice
from orpo_ray.evaluation.local_judge import LocalJudge
from orpo_ray.synthesis.candidates import Candidate
from orpo_ray.synthesis.labels.base import Answered, Tools
from orpo_ray.synthesis.refusals import check_some_are_taken


class Judged:
    """A `Labeller` that asks a judge."""

    def __init__(self, tools: Tools) -> None:
        config = tools.recipe.synthesize
        self._candidates = config.candidates
        url, model = config.judge.url, config.judge.model
        self._name = url or model
        self._judge: Judge = (
            ServerJudge(url, model, "synthesize.judge.url") if url else LocalJudge(model, "synthesize.judge.model")
        )
        # A judge of this process answers one question at a time.
        self._concurrency = config.server.concurrency if url else 1

    def check(self) -> None:
        """Check the address or the model of the judge. Raises UserError."""
        self._judge.check()

    def draws(self, row: PromptRow) -> int:
        """Return the number of candidates."""
        return self._candidates

    def score(self, part: Sequence[Answered]) -> list[list[Candidate] | RowError]:
        """Have the candidates compared. A row of which the judge refuses a question has a RowError.

        Raises:
            UserError: the judge does not answer, or it refuses all of these rows.
        """
        shown = [_shown(each.row) for each in part]
        asked = [
            (number, pair)
            for number, (each, images) in enumerate(zip(part, shown, strict=True))
            if not isinstance(images, RowError)
            for pair in combinations(range(len(each.candidates)), 2)
        ]

        def compare(question: tuple[int, tuple[int, int]]) -> Verdict | RowError:
            number, (one, other) = question
            answered, images = part[number], shown[number]
            assert not isinstance(images, RowError)
            texts = answered.candidates[one].text, answered.candidates[other].text
            try:
                return compare_twice(self._judge, text_of(answered.row.prompt), images, *texts)[0]
            except RowError as error:
                return error

        refused: dict[int, RowError] = {}
        points = [[0.0] * len(each.candidates) for each in part]
        with ThreadPoolExecutor(self._concurrency) as pool:
            for (number, (one, other)), verdict in zip(asked, pool.map(compare, asked), strict=True):
                if isinstance(verdict, RowError):
                    refused.setdefault(number, verdict)
                    continue
                points[number][one] += POINTS[verdict]
                points[number][other] += 1 - POINTS[verdict]
        tried = [refused.get(number) for number in dict(asked)]
        check_some_are_taken(tried, "judge", self._judge.field, self._name, TAKES_QUESTIONS)
        return [
            images if isinstance(images, RowError) else refused.get(number) or _with_rates(each.candidates, own)
            for number, (each, images, own) in enumerate(zip(part, shown, points, strict=True))
        ]


def _with_rates(candidates: Sequence[Candidate], points: Sequence[float]) -> list[Candidate]:
    comparisons = max(1, len(candidates) - 1)
    return [replace(each, score=own / comparisons) for each, own in zip(candidates, points, strict=True)]


def _shown(row: PromptRow) -> tuple[bytes, ...] | RowError:
    """Return what the judge sees of the images of a row: all of their pixels, as the model that answers does."""
    try:
        return tuple(map(sent_image, row.images))
    except RowError as error:
        return error
