"""Pairs by corruption: a good answer against one that is made wrong on purpose.

The good answer is the row's own, or without one the model's first candidate. The wrong one says something else about
the image, by rules for English, or is the model's answer to a degraded image.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from orpo_ray.config.synthesis import Corruption as Kind
from orpo_ray.data.image_changes import changed
from orpo_ray.data.images import load_image
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError
from orpo_ray.evaluation.draws import Draw
from orpo_ray.synthesis.candidates import CHANGED, GIVEN, Candidate, seed_of
from orpo_ray.synthesis.labels.base import Answered, Tools
from orpo_ray.synthesis.word_changes import change_word

DEGRADED: tuple[Kind, ...] = ("crop", "noise", "blank")
GOOD, WRONG = 1.0, 0.0


class Corruption:
    """A `Labeller` that makes the worse answer."""

    def __init__(self, tools: Tools) -> None:
        self._config, self._engine = tools.recipe.synthesize, tools.engine

    def check(self) -> None:
        """Nothing needs a check: the engine checks itself."""

    def draws(self, row: PromptRow) -> int:
        """Return 0 for a row that gives an answer, otherwise the number of candidates."""
        return self._config.candidates if row.answer is None else 0

    def score(self, part: Sequence[Answered]) -> list[list[Candidate] | RowError]:
        """Make a wrong answer for each row. Raises UserError if the engine does not answer."""
        good = [_good_answer(each) for each in part]
        orders = [self._order(each.row) for each in part]
        wrong: list[Candidate | None] = [None] * len(part)
        # All rows try their first change, then those without a wrong answer their second, so that the engine gets many
        # rows at a time.
        for number in range(len(self._config.corruptions)):
            tried = [place for place, each in enumerate(good) if each is not None and wrong[place] is None]
            kinds = {place: orders[place][number] for place in tried}
            for place in tried:
                if kinds[place] not in DEGRADED:
                    wrong[place] = self._reworded(part[place].row, good[place], kinds[place])
            asked = [place for place in tried if kinds[place] in DEGRADED and part[place].row.images]
            found = self._seen_degraded([part[place].row for place in asked], [kinds[place] for place in asked])
            for place, answer in zip(asked, found, strict=True):
                own = good[place]
                wrong[place] = answer if own is not None and answer is not None and answer.text != own.text else None
        return [_scored(own, other) for own, other in zip(good, wrong, strict=True)]

    def _order(self, row: PromptRow) -> list[Kind]:
        rng = np.random.default_rng(seed_of(self._config.seed, row.id, "order of corruptions"))
        return [self._config.corruptions[place] for place in rng.permutation(len(self._config.corruptions)).tolist()]

    def _reworded(self, row: PromptRow, good: Candidate | None, kind: Kind) -> Candidate | None:
        if good is None:
            return None
        seed = seed_of(self._config.seed, row.id, kind)
        change = change_word(good.text, kind, np.random.default_rng(seed))
        return None if change is None else Candidate(change.text, CHANGED, seed=seed, note=change.note)

    def _seen_degraded(self, rows: Sequence[PromptRow], kinds: Sequence[Kind]) -> list[Candidate | None]:
        """Let the model answer with degraded images."""
        found: list[Candidate | None] = [None] * len(rows)
        degraded: dict[int, PromptRow] = {}
        for place, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
            with suppress(RowError):  # an image that cannot be decoded, which no other step has looked at
                degraded[place] = _degraded(row, kind, self._config.seed)
        if not degraded:
            return found
        # The most likely answer: a sampled one might differ by chance alone, and be right.
        draws = [[Draw(0.0, seed_of(self._config.seed, rows[place].id, kinds[place]))] for place in degraded]
        answered = self._engine.answers(list(degraded.values()), draws)
        for place, answers, (draw,) in zip(degraded, answered, draws, strict=True):
            if not isinstance(answers, RowError) and answers[0].finished and answers[0].text:
                note = f"image: {kinds[place]}"
                found[place] = Candidate(answers[0].text, CHANGED, draw.temperature, draw.seed, note=note)
        return found


def _good_answer(answered: Answered) -> Candidate | None:
    if answered.row.answer is not None:
        return Candidate(answered.row.answer, GIVEN)
    return answered.candidates[0] if answered.candidates else None


def _scored(good: Candidate | None, wrong: Candidate | None) -> list[Candidate] | RowError:
    if good is None:
        return RowError("one_answer", "the row gives no answer, and the model none that can be used")
    if wrong is None:
        return RowError("nothing_to_corrupt", f"no corruption changes this answer: {good.text[:80]!r}")
    return [replace(good, score=GOOD), replace(wrong, score=WRONG)]


def _degraded(row: PromptRow, kind: Kind, seed: int) -> PromptRow:
    """Return a row with changed images, as PNG files."""
    images = []
    for place, image in enumerate(row.images):
        buffer = io.BytesIO()
        changed(load_image(image, None), kind, seed_of(seed, row.id, f"{kind} image"), place).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    return replace(row, images=images)
