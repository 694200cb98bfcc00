"""Scores by grounding: how much more likely an answer is under its own image than under others.

The score of an answer y of t tokens to image x is (log p(y | x) - log mean_j p(y | x_j)) / t, with x_j the images of
other rows of the part: the pointwise mutual information of answer and image, estimated with these images, per token. An
answer that fits most images has a score near 0. No judge and no given answer is needed.

Legend: K other images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from orpo_ray.data.pairs import Image
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError
from orpo_ray.evaluation.answer_scores import AnswerLogps
from orpo_ray.synthesis.candidates import Candidate, as_pair, seed_of
from orpo_ray.synthesis.labels.base import Answered, Tools
from orpo_ray.synthesis.source import content_keys


class Grounding:
    """A `Labeller` that needs no judge."""

    def __init__(self, tools: Tools) -> None:
        self._config, self._model = tools.recipe.synthesize, tools.model

    def check(self) -> None:
        """Check that the model is there. Raises UserError."""
        self._model.check()

    def draws(self, row: PromptRow) -> int:
        """Return the number of candidates; none for a row without images, which cannot be scored."""
        return self._config.candidates if row.images else 0

    def score(self, part: Sequence[Answered]) -> list[list[Candidate] | RowError]:
        """Score candidates under their own and under other images."""
        keys = [tuple(content_keys(each.row)) for each in part]
        return [self._score(each, self._others(place, part, keys)) for place, each in enumerate(part)]

    def _others(
        self, place: int, part: Sequence[Answered], keys: Sequence[tuple[str, ...]]
    ) -> list[list[Image]] | RowError:
        """Choose the images of other rows: as many images, other ones, each set once."""
        row = part[place].row
        if not row.images:
            return RowError("no_image", "the row has no image to compare with others")
        different = {
            key: other.row.images
            for other, key in zip(part, keys, strict=True)
            if key != keys[place] and len(other.row.images) == len(row.images)
        }
        if not different:
            return RowError("no_other_image", "no other row of the part has as many images and other ones")
        rng = np.random.default_rng(seed_of(self._config.seed, row.id, "other images"))
        # In the order of their content, so that the choice does not depend on the rows between them.
        ordered = [different[key] for key in sorted(different)]
        chosen = rng.choice(len(ordered), min(self._config.other_images, len(ordered)), replace=False)
        return [ordered[number] for number in chosen.tolist()]

    def _score(self, answered: Answered, others: list[list[Image]] | RowError) -> list[Candidate] | RowError:
        if isinstance(others, RowError) or len(answered.candidates) < 2:
            return others if isinstance(others, RowError) else answered.candidates
        row, texts = answered.row, [each.text for each in answered.candidates]
        shown = [row, *(replace(row, images=images) for images in others)]
        # Two answers to a pair, so that the vision encoder sees an image half as often.
        twos = [(texts[place], texts[min(place + 1, len(texts) - 1)]) for place in range(0, len(texts), 2)]
        found = self._model.logps([as_pair(each, *two) for each in shown for two in twos])
        own, *by_other = (_scored(found[first : first + len(twos)]) for first in range(0, len(found), len(twos)))
        if isinstance(own, RowError):
            return own
        # What is wrong with another image says nothing about this row.
        usable = [each for each in by_other if not isinstance(each, RowError)]
        if not usable:
            return RowError("no_other_image", f"none of {len(others)} other image(s) can be used: {by_other[0]}")
        return [
            replace(candidate, score=grounding_score([sums[place] for sums, _ in (own, *usable)], own[1][place]))
            for place, candidate in enumerate(answered.candidates)
        ]


def _scored(found: Sequence[AnswerLogps | RowError]) -> tuple[list[float], list[int]] | RowError:
    """Return log-probs and tokens of the answers under one set of images; a RowError if one cannot be scored."""
    sums, tokens = list[float](), list[int]()
    for each in found:
        if isinstance(each, RowError):
            return each
        sums += [each.chosen, each.rejected]
        tokens += [each.chosen_tokens, each.rejected_tokens]
    return sums, tokens


def grounding_score(logps: Sequence[float], tokens: int) -> float:
    """Return the score of an answer.

    Args:
        logps: its log-prob under its own image, then under each of the K others.
        tokens: its length.
    """
    own, *others = logps
    mean = np.logaddexp.reduce(np.array(others, np.float64)) - math.log(len(others))
    return float(own - mean) / tokens
