"""Answers by transformers in this process, on a GPU or on CPUs. All answers to a row are drawn in one batch."""

from __future__ import annotations

from collections.abc import Sequence

from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError
from orpo_ray.evaluation.draws import Draw, Drawn
from orpo_ray.synthesis.candidates import as_pair
from orpo_ray.synthesis.local_model import LocalModel


class TransformersEngine:
    """An `Engine` over a model of this process."""

    def __init__(self, model: LocalModel) -> None:
        self._model = model

    def check(self) -> None:
        """Check that the model is there. Raises UserError."""
        self._model.check()

    def prepare(self, part: int) -> None:
        """Do nothing: rows are asked one by one."""

    def answers(self, rows: Sequence[PromptRow], draws: Sequence[Sequence[Draw]]) -> list[list[Drawn] | RowError]:
        """Draw answers. Raises UserError if the model cannot be loaded."""
        return [self._answer(row, own) for row, own in zip(rows, draws, strict=True)]

    def _answer(self, row: PromptRow, draws: Sequence[Draw]) -> list[Drawn] | RowError:
        try:
            # A batch holds the answers to one row: what a row draws does not depend on the rows beside it.
            text, images = self._model.encoder.prompt_of(as_pair(row, "", ""), None)
            return self._model.answerer.draw(text, images, draws)
        except RowError as error:
            return error
