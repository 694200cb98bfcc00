"""Candidates: answers to the prompt of a row, each with what it was drawn with, and the protocol of what draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import xxhash

from orpo_ray.config.synthesis import SynthesizeConfig
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError
from orpo_ray.evaluation.draws import Draw, Drawn

MODEL, GIVEN, CHANGED = "model", "given", "changed"
_SEED_BITS = 31  # what every engine takes


@dataclass(frozen=True)
class Candidate:
    """An answer that may become the better or the worse one of a pair."""

    text: str
    origin: str = MODEL
    """`model`, `given` (the row's own answer) or `changed` (by a corruption)."""
    temperature: float | None = None
    seed: int | None = None
    score: float | None = None
    note: str = ""
    """How a changed answer was made, such as `color: red -> blue`."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


class Engine(Protocol):
    """Runs a model that answers prompts."""

    def check(self) -> None:
        """Check what can be checked before any model is loaded. Raises UserError."""

    def prepare(self, part: int) -> None:
        """Get ready for the rows of a part."""

    def answers(self, rows: Sequence[PromptRow], draws: Sequence[Sequence[Draw]]) -> list[list[Drawn] | RowError]:
        """Draw answers.

        Args:
            rows: rows with the bytes of their images.
            draws: for each row, temperature and seed of each answer.

        Returns:
            The answers to each row; a RowError for a row that the model cannot take.

        Raises:
            UserError: the model cannot be loaded, or does not answer.
        """


def draws_of(row_id: str, config: SynthesizeConfig) -> list[Draw]:
    """Return how the candidates of a row are drawn. It depends on the recipe's seed, the row's id and their numbers."""
    return [
        Draw(config.temperatures[number % len(config.temperatures)], seed_of(config.seed, row_id, number))
        for number in range(config.candidates)
    ]


def seed_of(seed: int, row_id: str, purpose: int | str) -> int:
    """Return a seed of 31 bits for one use of randomness."""
    return xxhash.xxh3_64_intdigest(f"{seed} {purpose} {row_id}".encode()) >> (64 - _SEED_BITS)


def usable(draws: Sequence[Draw], drawn: Sequence[Drawn]) -> list[Candidate]:
    """Return the answers that can be candidates: not empty, ended by the model, each text once."""
    found: dict[str, Candidate] = {}
    for draw, answer in zip(draws, drawn, strict=True):
        if answer.finished and answer.text:
            found.setdefault(answer.text, Candidate(answer.text, MODEL, draw.temperature, draw.seed))
    return list(found.values())


def with_answer(candidates: Sequence[Candidate], answer: str | None) -> list[Candidate]:
    """Add the row's own answer to the candidates, unless the model gave it too."""
    if answer is None or any(each.text == answer for each in candidates):
        return list(candidates)
    return [*candidates, Candidate(answer, GIVEN)]


def as_pair(row: PromptRow, chosen: str, rejected: str) -> PreferencePair:
    """Return a row with two answers."""
    return PreferencePair(row.id, row.images, row.prompt, chosen, rejected, row.source)
