"""Make one part: its rows, their candidates, scores and pairs. A worker makes one part after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.data.shards import ShardReader
from orpo_ray.errors import RowError
from orpo_ray.evaluation.draws import Draw, Drawn
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.candidates import Candidate, as_pair, draws_of, usable, with_answer
from orpo_ray.synthesis.engines.drafts import draft_key
from orpo_ray.synthesis.engines.registry import make_engine
from orpo_ray.synthesis.engines.vllm_engine import check_vllm
from orpo_ray.synthesis.labels.base import Answered, Tools
from orpo_ray.synthesis.labels.registry import make_label
from orpo_ray.synthesis.local_model import LocalModel
from orpo_ray.synthesis.pairing import best_and_worst
from orpo_ray.synthesis.part_files import PartFacts, write_part
from orpo_ray.synthesis.row_result import PAIR, RowResult
from orpo_ray.synthesis.source import SourceRows, content_keys


@dataclass(frozen=True)
class Job:
    """What every worker makes parts of."""

    recipe: dict[str, Any]
    source: SourceRows
    held_out: frozenset[str]
    """Content keys of the held-out pairs."""


class PartMaker:
    """Makes parts. Models are loaded for the first one."""

    def __init__(self, job: Job) -> None:
        self._recipe = recipe = Recipe.model_validate(job.recipe)
        self._source, self._held_out = job.source, job.held_out
        self._reader, self._folder = ShardReader(), RunFolder(recipe.run_uri)
        self._model = LocalModel(recipe)
        self._engine = make_engine(recipe, self._model, self._folder)
        self._label = make_label(Tools(recipe, self._model, self._engine))

    def check(self) -> None:
        """Check what can be checked before any model is loaded. Raises UserError."""
        if self._recipe.synthesize.engine == "vllm":
            check_vllm(self._recipe, self._model)
        self._engine.check()
        self._label.check()
        _ = self._model.encoder

    def make(self, part: int) -> PartFacts:
        """Make a part and write its files.

        Raises:
            UserError: a model cannot be loaded or does not answer, or a file is damaged.
        """
        self._engine.prepare(part)
        results = self._read(part)
        self._draw([result for result in results if result.outcome == PAIR])
        self._score([result for result in results if result.outcome == PAIR])
        self._check_pairs([result for result in results if result.outcome == PAIR])
        return write_part(self._folder, part, results, self._source.grouping)

    def requests(self, part: int) -> list[dict[str, Any]]:
        """Return the requests of a part, for an engine that draws ahead (`synthesis/ahead.py`)."""
        found: dict[str, dict[str, Any]] = {}
        rows = [each.row for each in self._read(part) if each.outcome == PAIR and isinstance(each.row, PromptRow)]
        for row in rows:
            try:
                prompt = self._model.prompt_of(row)
            except RowError:
                continue
            tokens = self._model.tokens_of(prompt)
            for draw in draws_of(row.id, self._recipe.synthesize)[: self._label.draws(row)]:
                key, images = draft_key(row, draw), [image["bytes"] for image in row.images]
                asked = {"prompt": prompt, "tokens": tokens, "images": images}
                found[key] = {"part": part, "key": key} | asked | asdict(draw)
        return [request | {"of": len(found)} for request in found.values()]

    def _read(self, part: int) -> list[RowResult]:
        """Read the rows of a part; note the bad ones, and those whose images are held out."""
        results = [RowResult(row) for row in self._source.read(part, self._reader)]
        for result in results:
            if isinstance(result.row, BadRow):
                result.fail(RowError(result.row.reason, result.row.detail))
            elif not self._held_out.isdisjoint(content_keys(result.row)):
                result.fail(RowError("held_out", "an image of the row is one of the held-out pairs"))
        return results

    def _draw(self, results: Sequence[RowResult]) -> None:
        config = self._recipe.synthesize
        rows = [result.row for result in results if isinstance(result.row, PromptRow)]
        draws = [draws_of(row.id, config)[: self._label.draws(row)] for row in rows]
        for result, row, own, answers in zip(results, rows, draws, self._answers(rows, draws), strict=True):
            if isinstance(answers, RowError):
                result.fail(answers)
                continue
            found = usable(own, answers)
            result.left_out = len(own) - len(found)
            result.candidates = with_answer(found, row.answer) if config.include_answer else found

    def _answers(self, rows: Sequence[PromptRow], draws: Sequence[Sequence[Draw]]) -> list[list[Drawn] | RowError]:
        """Ask the engine about the rows that need answers."""
        asked = [place for place, own in enumerate(draws) if own]
        found: list[list[Drawn] | RowError] = [[] for _ in rows]
        answers = self._engine.answers([rows[place] for place in asked], [draws[place] for place in asked])
        for place, each in zip(asked, answers, strict=True):
            found[place] = each
        return found

    def _score(self, results: Sequence[RowResult]) -> None:
        part = [Answered(result.row, result.candidates) for result in results if isinstance(result.row, PromptRow)]
        for result, scored in zip(results, self._label.score(part), strict=True):
            try:
                if isinstance(scored, RowError):
                    raise scored
                result.candidates = [_rounded(each) for each in scored]
                result.pair = best_and_worst(result.candidates, self._recipe.synthesize.min_margin)
            except RowError as error:
                result.fail(error)

    def _check_pairs(self, results: Sequence[RowResult]) -> None:
        """Encode the pairs as training will, so that the set has no bad rows."""
        pairs = [
            as_pair(result.row, result.pair[0].text, result.pair[1].text)
            for result in results
            if isinstance(result.row, PromptRow) and result.pair is not None
        ]
        for result, encoded in zip(results, self._model.encoder.encode_many(pairs, [None] * len(pairs)), strict=True):
            if not isinstance(encoded, EncodedPair):
                result.fail(encoded)


def _rounded(candidate: Candidate) -> Candidate:
    """Round the score, so that files do not differ where the last bits of a sum do."""
    return candidate if candidate.score is None else replace(candidate, score=round(candidate.score, 6))
