"""The report of a data check: counts, lengths, bad rows, duplicates, biases.

Encoding processes collect `PairFacts` (`facts.py`) for each row; this module summarizes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data_report.facts import PairFacts
from orpo_ray.data_report.groups import figures_by, warnings_of_groups
from orpo_ray.data_report.text_only_baseline import TextOnlyPair, text_only_accuracy
from orpo_ray.extras import is_installed

BINS = 30
BAD_EXAMPLES = 50
GALLERY_SAMPLE = 36
GALLERY_EXTREMES = 8


@dataclass
class SplitCheck:
    """Collects the rows of a split with `add`, and summarizes them with `report`."""

    max_length: int
    """The recipe's `data.max_length`."""
    policy: str
    """The recipe's `data.on_too_long`."""
    formats: dict[str, int]
    """Number of rows per format."""
    facts: list[PairFacts] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)

    def add(self, row: PairFacts | BadRow) -> None:
        """Add one row: the facts of a pair, or a bad row."""
        if isinstance(row, BadRow):
            self.bad.append(row)
        else:
            self.facts.append(row)

    def sort(self) -> None:
        """Sort the rows, which arrive in any order, by sample index."""
        self.facts.sort(key=lambda facts: facts.sample_index)
        self.bad.sort(key=lambda row: row.sample_index)

    def report(self) -> dict[str, Any]:
        """Return the summary of the split, for `--json` and the page."""
        bad, good = self.bad, self.facts
        rows = len(good) + len(bad)
        too_long = sum(facts.sequence > self.max_length for facts in good)
        found: dict[str, Any] = {
            "rows": rows,
            "pairs": len(good) - (too_long if self.policy == "skip" else 0),
            "bad": {
                "total": len(bad),
                "fraction": len(bad) / max(1, rows),
                "by_reason": dict(Counter(row.reason for row in bad).most_common()),
                "examples": [row.as_line() for row in bad[:BAD_EXAMPLES]],
            },
            "formats": self.formats,
            "images_per_pair": {str(n): c for n, c in sorted(Counter(len(facts.images) for facts in good).items())},
            "image_sizes": _image_sizes(good),
            "tokens": self._tokens(good),
            "histograms": self._histograms(good),
            "too_long": {"count": too_long, "fraction": too_long / max(1, rows), "policy": self.policy},
            "languages": figures_by("language", good, bad, self.max_length),
            "domains": figures_by("domain", good, bad, self.max_length),
            "duplicates": _duplicates(good),
            "length_bias": _length_bias(good),
            "text_only": text_only_accuracy([TextOnlyPair(facts.question, *facts.texts) for facts in good])
            if is_installed("sklearn")
            else None,
        }
        return found | {"warnings": warnings_of_groups(found, self.max_length)}

    def gallery(self) -> dict[str, list[int]]:
        """Return the sample indices of pairs to show on the page, by the reason for showing them."""
        good = self.facts
        if not good:
            return {}
        evenly_spaced = np.unique(np.linspace(0, len(good) - 1, GALLERY_SAMPLE).round().astype(int))
        by_length = sorted(good, key=lambda facts: (facts.sequence, facts.sample_index))
        by_difference = sorted(good, key=lambda facts: -abs(facts.tokens[2] - facts.tokens[3]))
        repeated = Counter(facts.pair for facts in good)
        selected = {
            "sample": [good[index] for index in evenly_spaced],
            "longest": by_length[::-1][:GALLERY_EXTREMES],
            "shortest": by_length[:GALLERY_EXTREMES],
            "length difference": by_difference[:GALLERY_EXTREMES],
            "too long": [facts for facts in good if facts.sequence > self.max_length][:GALLERY_EXTREMES],
            "duplicate": [facts for facts in good if repeated[facts.pair] > 1][:GALLERY_EXTREMES],
        }
        return {reason: [facts.sample_index for facts in found] for reason, found in selected.items() if found}

    def _tokens(self, good: Sequence[PairFacts]) -> dict[str, Any] | None:
        return {name: _percentiles(values) for name, values in _lengths(good).items()} if good else None

    def _histograms(self, good: Sequence[PairFacts]) -> dict[str, Any]:
        histograms = {}
        for name, values in _lengths(good).items():
            if good and name != "image":
                # The longest 0.5 % share the last bin, so that outliers do not compress all others into the first bins.
                clipped = np.minimum(values, np.percentile(values, 99.5, method="nearest"))
                counts, edges = np.histogram(clipped, bins=min(BINS, max(1, int(np.ptp(clipped)) + 1)))
                histograms[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
        return histograms


def images_on_both_sides(train: SplitCheck, held_out: SplitCheck | None) -> int:
    """Count the images that occur both in the training pairs and in the held-out pairs."""
    if held_out is None:
        return 0
    sides = [{image for facts in split.facts for image in facts.images} for split in (train, held_out)]
    return len(sides[0] & sides[1])


def warnings_of(facts: PairFacts, max_length: int) -> list[str]:
    """Return warnings about a pair, for the page."""
    chosen, rejected = facts.tokens[2:]
    found = []
    if facts.sequence > max_length:
        found.append(f"too long: {facts.sequence} tokens")
    if max(chosen, rejected) >= 8 * min(chosen, rejected) and max(chosen, rejected) >= 32:
        found.append("very different answer lengths")
    if not facts.images:
        found.append("no image")
    return found


def _lengths(good: Sequence[PairFacts]) -> dict[str, np.ndarray]:
    tokens = np.array([facts.tokens for facts in good], np.int64).reshape(-1, 4)
    sequences = np.array([facts.sequence for facts in good], np.int64)
    names = ("prompt", "image", "chosen", "rejected")
    return {name: tokens[:, column] for column, name in enumerate(names)} | {"sequence": sequences}


def _image_sizes(good: Sequence[PairFacts]) -> dict[str, dict[str, float]] | None:
    sizes = np.array([size for facts in good for size in facts.sizes])
    return {"width": _percentiles(sizes[:, 0]), "height": _percentiles(sizes[:, 1])} if len(sizes) else None


def _percentiles(values: np.ndarray) -> dict[str, float]:
    points = dict(zip(("min", "p50", "p90", "p95", "p99", "max"), (0, 50, 90, 95, 99, 100), strict=True))
    found = np.percentile(values, list(points.values()), method="nearest")
    return dict(zip(points, map(float, found), strict=True)) | {"mean": float(values.mean())}


def _duplicates(good: Sequence[PairFacts]) -> dict[str, int]:
    pairs, questions = {facts.pair for facts in good}, {facts.question for facts in good}
    return {
        "pairs": len(good) - len(pairs),
        "prompts": len(good) - len(questions),
        # Each contradiction is found from both of its pairs.
        "contradictions": sum(facts.exchanged != facts.pair and facts.exchanged in pairs for facts in good) // 2,
    }


def _length_bias(good: Sequence[PairFacts]) -> dict[str, float] | None:
    if not good:
        return None
    lengths = np.array([facts.tokens[2:] for facts in good])
    difference = lengths[:, 0] - lengths[:, 1]
    return {
        "chosen_longer": float((difference > 0).mean()),
        "equal": float((difference == 0).mean()),
        "median_difference": float(np.median(difference)),
    }
