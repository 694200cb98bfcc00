"""The two files of a part: its pairs as a shard of a prepared set, and what became of each of its rows.

The file of pairs is written last and at once: if it exists, the part is complete. It holds the facts of the part in its
metadata.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.groups import Grouping
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.data_report.prepare import PREPARED
from orpo_ray.data_report.scan import clean_schema, group_columns
from orpo_ray.storage.files import locate, with_retries
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.candidates import Candidate
from orpo_ray.synthesis.row_result import RowResult

PAIRS, CANDIDATES = f"{PREPARED}/train", f"{PREPARED}/candidates"
_FACTS = b"orpo_ray.part"
_ANSWER = [("score", pa.float64()), ("temperature", pa.float64()), ("seed", pa.int64()), ("origin", pa.string())]
_HOW = pa.schema([(f"{side}_{name}", kind) for side in ("chosen", "rejected") for name, kind in _ANSWER])


@dataclass(frozen=True)
class PartFacts:
    """Counts of a part."""

    part: int
    rows: int
    pairs: int
    thrown_away: dict[str, int]
    """Reason -> usable rows without a pair."""
    candidates: int
    left_out: int
    """Answers that were drawn and are no candidates: empty, cut off or repeated."""
    margins: float
    """Sum of the differences between the scores of chosen and rejected answers."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    """Fields of the bad rows."""

    @property
    def bad_rows(self) -> list[BadRow]:
        """The bad rows."""
        return [BadRow(**each) for each in self.bad]


def pairs_file(part: int) -> str:
    """Return the name of a part's pairs in the run folder."""
    return f"{PAIRS}/{part:05d}.parquet"


def candidates_file(part: int) -> str:
    """Return the name of the file that says what became of each row of a part."""
    return f"{CANDIDATES}/{part:05d}.jsonl"


def schema_of(grouping: Grouping) -> pa.Schema:
    """Return the columns of a prepared set, those of language and domain by their names, and how each answer came."""
    return pa.schema([*(column for column in clean_schema(grouping) if column.name not in _HOW.names), *_HOW])


def write_part(folder: RunFolder, part: int, results: Sequence[RowResult], grouping: Grouping) -> PartFacts:
    """Write the files of a part; the pairs keep the columns that name their language and domain."""
    facts = _facts_of(part, results)
    lines = "".join(json.dumps(_line(result), ensure_ascii=False) + "\n" for result in results)
    folder.write(candidates_file(part), lines.encode())
    rows = [row for result in results if (row := _row(result, grouping)) is not None]
    schema = schema_of(grouping).with_metadata({_FACTS: json.dumps(asdict(facts)).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    folder.write(pairs_file(part), sink.getvalue().to_pybytes())
    return facts


def read_facts(folder: RunFolder, part: int) -> PartFacts | None:
    """Read the facts of a part; None if it is not complete."""
    name = pairs_file(part)
    if not folder.has(name):
        return None
    filesystem, path = locate(f"{folder.uri}/{name}", "checkpoint.storage")
    metadata = with_retries(pq.read_schema, path, filesystem=filesystem).metadata
    return PartFacts(**json.loads(metadata[_FACTS]))


def _facts_of(part: int, results: Sequence[RowResult]) -> PartFacts:
    good = [result for result in results if not isinstance(result.row, BadRow)]
    pairs = [result.pair for result in good if result.pair is not None]
    return PartFacts(
        part=part,
        rows=len(results),
        pairs=len(pairs),
        thrown_away=dict(sorted(Counter(result.outcome for result in good if result.pair is None).items())),
        candidates=sum(len(result.candidates) for result in good),
        left_out=sum(result.left_out for result in good),
        margins=sum((best.score or 0.0) - (worst.score or 0.0) for best, worst in pairs),
        bad=[asdict(result.row) for result in results if isinstance(result.row, BadRow)],
    )


def _line(result: RowResult) -> dict[str, Any]:
    """Return what became of a row."""
    line: dict[str, Any] = {"id": result.row.id, "source": result.row.source, "outcome": result.outcome}
    if result.detail:
        line["detail"] = result.detail
    return line | {"candidates": [each.as_json() for each in result.candidates]}


def _row(result: RowResult, grouping: Grouping) -> dict[str, Any] | None:
    """Return the pair of a row in the columns of `schema_of`; None if it has none."""
    if result.pair is None or not isinstance(result.row, PromptRow):
        return None
    row, (chosen, rejected) = result.row, result.pair
    named = {name: getattr(row, name) for name in ("id", "source", "images", "prompt")}
    named |= {name: getattr(row, kind) for name, kind in group_columns(grouping).items()}
    answers = {"chosen": chosen.text, "rejected": rejected.text}
    return named | answers | _how("chosen", chosen) | _how("rejected", rejected)


def _how(side: str, candidate: Candidate) -> dict[str, Any]:
    return {f"{side}_{name}": getattr(candidate, name) for name, _ in _ANSWER}
