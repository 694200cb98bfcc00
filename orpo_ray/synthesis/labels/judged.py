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
from orpo_ray.evaluation.generation import text_of
from orpo_ray.evaluation.judge import POINTS, Judge, ServerJudge, Verdict, compare_twice
from orpo_ray.evaluation.local_judge import LocalJudge
from orpo_ray.pages.thumbnails import small_jpeg
from orpo_ray.synthesis.candidates import Candidate
from orpo_ray.synthesis.labels.base import Answered, Tools


class Judged:
    """A `Labeller` that asks a judge."""

    def __init__(self, tools: Tools) -> None:
        config = tools.recipe.synthesize
        self._candidates = config.candidates
        url, model = config.judge.url, config.judge.model
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
        """Have the candidates compared. Raises UserError if the judge does not answer."""
        shown = [_shown(each.row) for each in part]
        asked = [
            (number, pair)
            for number, (each, images) in enumerate(zip(part, shown, strict=True))
            if not isinstance(images, RowError)
            for pair in combinations(range(len(each.candidates)), 2)
        ]

        def compare(question: tuple[int, tuple[int, int]]) -> Verdict:
            number, (one, other) = question
            answered, images = part[number], shown[number]
            assert not isinstance(images, RowError)
            texts = answered.candidates[one].text, answered.candidates[other].text
            return compare_twice(self._judge, text_of(answered.row.prompt), images, *texts)[0]

        points = [[0.0] * len(each.candidates) for each in part]
        with ThreadPoolExecutor(self._concurrency) as pool:
            for (number, (one, other)), verdict in zip(asked, pool.map(compare, asked), strict=True):
                points[number][one] += POINTS[verdict]
                points[number][other] += 1 - POINTS[verdict]
        return [
            images if isinstance(images, RowError) else _with_rates(each.candidates, own)
            for each, images, own in zip(part, shown, points, strict=True)
        ]


def _with_rates(candidates: Sequence[Candidate], points: Sequence[float]) -> list[Candidate]:
    comparisons = max(1, len(candidates) - 1)
    return [replace(each, score=own / comparisons) for each, own in zip(candidates, points, strict=True)]


def _shown(row: PromptRow) -> tuple[bytes, ...] | RowError:
    """Return what the judge sees of the images of a row."""
    images = [small_jpeg(image, None, allow_http=False) for image in row.images]
    found = tuple(image for image in images if image is not None)
    return found if len(found) == len(images) else RowError("unreadable_image", "an image cannot be shown to the judge")
