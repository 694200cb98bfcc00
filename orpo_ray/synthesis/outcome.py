"""What a synthesis made: counts over all parts, and the manifest of the set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data_report.prepare import Prepared
from orpo_ray.synthesis.part_files import PartFacts, pairs_file


@dataclass(frozen=True)
class Synthesized:
    """A set of synthetic pairs."""

    uri: str
    """Path or URI of the folder that `data.train` takes."""
    rows: int
    """Rows that were read."""
    pairs: int
    thrown_away: dict[str, int]
    """Reason -> usable rows without a pair."""
    bad: list[BadRow]
    """Rows that cannot be used."""
    candidates: int
    left_out: int
    """Answers that were drawn and are no candidates: empty, cut off or repeated."""
    mean_margin: float
    """Mean difference between the scores of chosen and rejected answers."""
    was_finished: bool = False
    """Whether the set was whole before, so that nothing was done."""
    eval_uri: str | None = None
    """Path or URI of the folder that `data.eval` takes, if the held-out pairs were written too."""

    @classmethod
    def of(cls, uri: str, parts: Sequence[PartFacts], was_finished: bool = False) -> Synthesized:
        """Add up the facts of all parts, in their order."""
        pairs = sum(part.pairs for part in parts)
        thrown_away = Counter[str]()
        for part in parts:
            thrown_away.update(part.thrown_away)
        return cls(
            uri=uri,
            rows=sum(part.rows for part in parts),
            pairs=pairs,
            thrown_away=dict(sorted(thrown_away.items())),
            bad=[row for part in parts for row in part.bad_rows],
            candidates=sum(part.candidates for part in parts),
            left_out=sum(part.left_out for part in parts),
            mean_margin=sum(part.margins for part in parts) / max(1, pairs),
            was_finished=was_finished,
        )

    @property
    def thrown_away_fraction(self) -> float:
        """Fraction of the usable rows that became no pair."""
        return sum(self.thrown_away.values()) / max(1, self.rows - len(self.bad))

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "uri": self.uri,
            "eval_uri": self.eval_uri,
            "rows": self.rows,
            "pairs": self.pairs,
            "bad_rows": len(self.bad),
            "thrown_away": self.thrown_away,
            "thrown_away_fraction": self.thrown_away_fraction,
            "candidates": self.candidates,
            "left_out": self.left_out,
            "mean_margin": self.mean_margin,
        }


def manifest_of(
    recipe: Recipe,
    made: Synthesized,
    parts: Sequence[PartFacts],
    identity: dict[str, Any],
    held_out: Prepared | None = None,
) -> dict[str, Any]:
    """Describe a set as `orpo-ray data prepare` does, and how it was made.

    Args:
        recipe: the recipe.
        made: counts over all parts.
        parts: facts of the parts.
        identity: what decides the set.
        held_out: the held-out pairs, if they were written too.
    """
    data = recipe.model_dump(mode="json")["data"]
    counts = {name: value for name, value in made.as_json().items() if name not in ("uri", "eval_uri", "bad_rows")}
    shards = {pairs_file(part.part).rpartition("/")[2]: part.pairs for part in parts}
    return {
        "format": "trl",
        "model": recipe.model.id,
        "data": data | {"train": recipe.synthesize.source or data["train"]},
        "splits": {"train": {"rows": made.pairs, "bad_rows": len(made.bad), "shards": shards}}
        | ({} if held_out is None else {"eval": held_out.as_json()}),
        "synthesis": identity | counts,
    }
