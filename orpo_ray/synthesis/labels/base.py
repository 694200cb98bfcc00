"""The `Labeller` protocol, which every label implements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError
from orpo_ray.synthesis.candidates import Candidate, Engine
from orpo_ray.synthesis.local_model import LocalModel


@dataclass(frozen=True)
class Answered:
    """A row and the candidates for its pair."""

    row: PromptRow
    """With the bytes of its images."""
    candidates: list[Candidate]
    """Each text once."""


@dataclass(frozen=True)
class Tools:
    """What a label is made with."""

    recipe: Recipe
    model: LocalModel
    """Scores answers; loaded when used first."""
    engine: Engine
    """Draws answers."""


class Labeller(Protocol):
    """Scores candidates. The best and the worst of a row become its pair."""

    def check(self) -> None:
        """Check what can be checked before any model is loaded. Raises UserError."""

    def draws(self, row: PromptRow) -> int:
        """Return how many of a row's candidates are needed."""

    def score(self, part: Sequence[Answered]) -> list[list[Candidate] | RowError]:
        """Score the candidates of the rows of a part.

        Args:
            part: the rows that have candidates. What a row's scores depend on must lie in the part, the recipe and the
                model, so that a part is the same whoever makes it.

        Returns:
            For each row, candidates with scores, higher for better ones; a RowError for a row that has no pair.

        Raises:
            UserError: a model cannot be loaded, or does not answer.
        """
