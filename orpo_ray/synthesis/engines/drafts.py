"""Answers that were drawn before, by an engine that runs over all parts at once: a file for each part.

Such a file lists the answers by a key of the prompt, its images and the draw, so that it does not matter in which order
they came. Files are deleted once the set is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.data_report.prepare import PREPARED
from orpo_ray.errors import OrpoRayError, RowError
from orpo_ray.evaluation.draws import Draw, Drawn
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.local_model import LocalModel
from orpo_ray.synthesis.source import content_keys

DRAFTS = f"{PREPARED}/drafts"


class DraftsIncomplete(OrpoRayError):
    """A file of answers lacks one that should be there."""


def draft_key(row: PromptRow, draw: Draw) -> str:
    """Return the key of an answer."""
    facts = [row.prompt, content_keys(row), draw.temperature, draw.seed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def drafts_file(part: int) -> str:
    """Return the name of a part's answers in the run folder."""
    return f"{DRAFTS}/{part:05d}.json"


def write_drafts(folder: RunFolder, part: int, answers: Mapping[str, Drawn]) -> None:
    """Write the answers of a part by their keys."""
    found = {key: [answers[key].text, answers[key].finished] for key in sorted(answers)}
    folder.write(drafts_file(part), json.dumps(found, ensure_ascii=False).encode())


class DraftEngine:
    """An `Engine` that finds its answers in the files."""

    def __init__(self, folder: RunFolder, model: LocalModel) -> None:
        self._folder, self._model = folder, model
        self._answers: dict[str, Drawn] = {}

    def check(self) -> None:
        """Nothing needs a check."""

    def prepare(self, part: int) -> None:
        """Read the answers of a part."""
        name = drafts_file(part)
        self._folder.pull(name)
        raw = json.loads((self._folder.path / name).read_text("utf-8"))
        self._answers = {key: Drawn(*value) for key, value in raw.items()}

    def answers(self, rows: Sequence[PromptRow], draws: Sequence[Sequence[Draw]]) -> list[list[Drawn] | RowError]:
        """Return the answers that were drawn. Raises DraftsIncomplete."""
        return [self._answer(row, own) for row, own in zip(rows, draws, strict=True)]

    def _answer(self, row: PromptRow, draws: Sequence[Draw]) -> list[Drawn] | RowError:
        try:
            self._model.prompt_of(row)  # a row that the model cannot take was not asked
            return [self._answers[draft_key(row, draw)] for draw in draws]
        except RowError as error:
            return error
        except KeyError as error:
            raise DraftsIncomplete(
                f"an answer is missing in {self._folder.uri}/{DRAFTS}: {error}\n"
                "  fix: delete that folder, and run the same command again"
            ) from None
