"""What a set of pairs is like, before anything is trained on it: counts, lengths, bad rows, duplicates, biases.

`PairFacts` are gathered row by row where the pairs are encoded; here they become the report. Nothing is decoded anew.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data_report.text_only_baseline import TextOnlyPair, text_only_accuracy
from orpo_ray.extras import is_installed

BINS = 30
BAD_EXAMPLES = 50
TEXT_KEPT = 600  # characters of each text, for the estimate without images
GALLERY_SAMPLE = 36
GALLERY_EXTREMES = 8


@dataclass(frozen=True)
class PairFacts:
    """What is known of one pair after encoding.

    tokens: of prompt, image placeholders in it, chosen, rejected. images: fingerprints. sizes:
    (width, height) of every image. question, pair: hashes of images + prompt, and of all; exchanged: of the pair with
    its answers exchanged. texts: prompt, chosen, rejected, shortened.
    """

    sample_index: int
    id: str
    source: str
    tokens: tuple[int, int, int, int] = (0, 0, 0, 0)
    images: tuple[str, ...] = ()
    question: str = ""
    pair: str = ""
    exchanged: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    texts: tuple[str, str, str] = ("", "", "")

    @property
    def sequence(self) -> int:
        """Tokens of prompt + longer answer: what `data.max_length` bounds."""
        return self.tokens[0] + max(self.tokens[2], self.tokens[3])


def facts_of(
    pair: PreferencePair, encoded: EncodedPair, fingerprints: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> PairFacts:
    """The facts of a pair that was encoded. fingerprints, sizes (width, height): of its images."""
    prompt = json.dumps(pair.prompt)
    question = _hash(*fingerprints, prompt)
    words = " ".join(part["text"] for turn in pair.prompt for part in turn["content"] if part["type"] == "text")
    image_tokens = int((~encoded.prompt_is_text).sum())
    second = encoded.rejected_prompt.ids if encoded.rejected_prompt else encoded.prompt_ids
    return PairFacts(
        sample_index=encoded.sample_index,
        id=pair.id,
        source=pair.source,
        tokens=(
            max(len(encoded.prompt_ids), len(second)),
            image_tokens,
            len(encoded.chosen_ids),
            len(encoded.rejected_ids),
        ),
        images=tuple(fingerprints),
        question=question,
        pair=_hash(question, pair.chosen, pair.rejected),
        exchanged=_hash(question, pair.rejected, pair.chosen),
        sizes=tuple(sizes),
        texts=(words[:TEXT_KEPT], pair.chosen[:TEXT_KEPT], pair.rejected[:TEXT_KEPT]),
    )


def facts_from_json(facts: Mapping[str, Any]) -> PairFacts:
    """`dataclasses.asdict` of facts, through JSON and back."""
    lists = {name: tuple(value) for name, value in facts.items() if isinstance(value, list)}
    lists["sizes"] = tuple(map(tuple, facts["sizes"]))
    return PairFacts(**{**facts, **lists})


@dataclass
class SplitCheck:
    """Everything said of one split: gathered with `add`, told with `report`.

    max_length, policy: the recipe's `data.max_length` and `data.on_too_long`. formats: rows of each.
    """

    max_length: int
    policy: str
    formats: dict[str, int]
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
        """The split as plain numbers, for `--json` and the page."""
        bad, good = self.bad, self.facts
        rows = len(good) + len(bad)
        too_long = sum(facts.sequence > self.max_length for facts in good)
        return {
            "rows": rows,
            "pairs": len(good) - (too_long if self.policy == "skip" else 0),
            "bad": {
                "total": len(bad),
                "share": len(bad) / max(1, rows),
                "by_reason": dict(Counter(row.reason for row in bad).most_common()),
                "examples": [row.as_line() for row in bad[:BAD_EXAMPLES]],
            },
            "formats": self.formats,
            "images_per_pair": {str(n): c for n, c in sorted(Counter(len(facts.images) for facts in good).items())},
            "image_sizes": _image_sizes(good),
            "tokens": self._tokens(good),
            "histograms": self._histograms(good),
            "too_long": {"count": too_long, "share": too_long / max(1, rows), "policy": self.policy},
            "duplicates": _duplicates(good),
            "length_bias": _length_bias(good),
            "blind": text_only_accuracy([TextOnlyPair(facts.question, *facts.texts) for facts in good])
            if is_installed("sklearn")
            else None,
        }

    def gallery(self) -> dict[str, list[int]]:
        """Slots of pairs worth a look, by why."""
        good = self.facts
        if not good:
            return {}
        places = np.unique(np.linspace(0, len(good) - 1, GALLERY_SAMPLE).round().astype(int))
        by_length = sorted(good, key=lambda facts: (facts.sequence, facts.sample_index))
        by_difference = sorted(good, key=lambda facts: -abs(facts.tokens[2] - facts.tokens[3]))
        repeated = Counter(facts.pair for facts in good)
        chosen = {
            "sample": [good[place] for place in places],
            "longest": by_length[::-1][:GALLERY_EXTREMES],
            "shortest": by_length[:GALLERY_EXTREMES],
            "length difference": by_difference[:GALLERY_EXTREMES],
            "too long": [facts for facts in good if facts.sequence > self.max_length][:GALLERY_EXTREMES],
            "duplicate": [facts for facts in good if repeated[facts.pair] > 1][:GALLERY_EXTREMES],
        }
        return {why: [facts.sample_index for facts in found] for why, found in chosen.items() if found}

    def _tokens(self, good: Sequence[PairFacts]) -> dict[str, Any] | None:
        return {name: _percentiles(values) for name, values in _lengths(good).items()} if good else None

    def _histograms(self, good: Sequence[PairFacts]) -> dict[str, Any]:
        histograms = {}
        for name, values in _lengths(good).items():
            if good and name != "image":
                # The few longest share the last bin, so that they do not squeeze all others into the first.
                shown = np.minimum(values, np.percentile(values, 99.5, method="nearest"))
                counts, edges = np.histogram(shown, bins=min(BINS, max(1, int(np.ptp(shown)) + 1)))
                histograms[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
        return histograms


def images_on_both_sides(train: SplitCheck, held_out: SplitCheck | None) -> int:
    """Images that stand in the training set and among the held-out pairs."""
    if held_out is None:
        return 0
    sides = [{image for facts in split.facts for image in facts.images} for split in (train, held_out)]
    return len(sides[0] & sides[1])


def warnings_of(facts: PairFacts, max_length: int) -> list[str]:
    """What a look at this pair should know."""
    chosen, rejected = facts.tokens[2:]
    found = []
    if facts.sequence > max_length:
        found.append(f"too long: {facts.sequence} tokens")
    if max(chosen, rejected) >= 8 * min(chosen, rejected) and max(chosen, rejected) >= 32:
        found.append("answers of very unlike length")
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
        # Seen from both sides, so each contradiction twice.
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


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()[:24]
