"""What the scores of held-out pairs say: averages with intervals, groups of pairs, a comparison, and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from orpo_ray.data.groups import KINDS
from orpo_ray.evaluation.group_metrics import OTHER, most_common
from orpo_ray.evaluation.pair_scores import BLANK, CORRECT, EXCHANGED, KEYS
from orpo_ray.evaluation.statistics import Comparison, Estimate, compare, mean_estimate, mean_estimates

CHANCE = 0.5
ACCURATE = "The model prefers the chosen answers"
# A grounding gap below this is no use of the images that matters.
SMALL_GAP = 0.05
GROUPS = 12  # of a breakdown; the rest is OTHER
NO_GROUP = "(none)"
ACCURACIES, MARGINS, GAP = "rewards/accuracies", "rewards/margins", "grounding_gap"
_FRACTIONS = ("accuracies", "_fraction")
Level = Literal["good", "warning", "problem", "none"]


@dataclass(frozen=True)
class Verdict:
    """What a figure means."""

    level: Level
    headline: str
    """In a few words."""
    detail: str = ""

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{self.headline}: {self.detail}." if self.detail else f"{self.headline}."


@dataclass(frozen=True)
class Group:
    """Some of the pairs."""

    name: str
    accuracy: Estimate
    margin: Estimate | None
    gap: Estimate | None

    def as_json(self) -> dict[str, Any]:
        """The fields, for `--json`."""
        figures = {"accuracy": self.accuracy, "margin": self.margin, "grounding_gap": self.gap}
        return {"name": self.name} | {name: each and each.as_json() for name, each in figures.items()}


@dataclass(frozen=True)
class Summary:
    """The result of an evaluation, as the table, `--json` and the report show it."""

    figures: dict[str, Estimate]
    """Averages over pairs by name: those of the objective, and of grounding."""
    breakdowns: dict[str, list[Group]]
    """Title -> groups of pairs."""
    verdicts: list[Verdict]
    base: str | None = None
    """What the model was compared with."""
    comparison: Comparison | None = None

    @property
    def partial(self) -> list[str]:
        """Names of the figures that only a part of the pairs has."""
        return [name for name, each in self.figures.items() if each.pairs != self.figures[ACCURACIES].pairs]

    def as_json(self) -> dict[str, Any]:
        """Return it for `--json`, beside the metrics."""
        compared = None
        if self.comparison is not None:
            compared = {"model": self.base} | self.comparison.as_json()
        return {
            "intervals": {f"eval/{name}": [each.low, each.high] for name, each in self.figures.items()},
            "interval_pairs": {f"eval/{name}": self.figures[name].pairs for name in self.partial},
            "breakdowns": {title: [group.as_json() for group in groups] for title, groups in self.breakdowns.items()},
            "verdicts": [{"level": each.level, "headline": each.headline, "text": each.text} for each in self.verdicts],
            "base": compared,
        }


def summarize(
    pairs: pa.Table,
    categories: Mapping[str, Mapping[int, str]] | None = None,
    base: tuple[str, pa.Table] | None = None,
) -> Summary:
    """Summarize a table of pair scores, also by language and by domain if it has them.

    Args:
        pairs: the table.
        categories: title -> sample index -> group, for further breakdowns.
        base: name and table of the model to compare with, scored on the same pairs.
    """
    figures = estimates_of(pairs)
    breakdowns = {"length of the answers": _groups(pairs, length_groups(pairs))}
    breakdowns |= {"the longer answer": _groups(pairs, longer_answer(pairs))}
    for kind in KINDS:
        if kind in pairs.column_names and (named := pairs[kind].to_pylist()).count(None) < len(named):
            breakdowns[kind] = _groups(pairs, most_common([name or NO_GROUP for name in named], GROUPS))
    for title, group_of in (categories or {}).items():
        names = [group_of.get(each, NO_GROUP) for each in pairs["sample_index"].to_pylist()]
        breakdowns[title] = _groups(pairs, most_common(names, GROUPS))
    comparison = None if base is None else compare_tables(pairs, base[1])
    verdicts = [judge_accuracy(figures[ACCURACIES]), judge_grounding(figures)]
    if base is not None and comparison is not None:
        verdicts.insert(0, judge_comparison(comparison, base[0]))
    return Summary(figures, breakdowns, [v for v in verdicts if v], base and base[0], comparison)


def estimates_of(pairs: pa.Table) -> dict[str, Estimate]:
    """Estimate every figure of a table: its own, and the accuracies and gaps of passes with other images.

    A figure that some pairs do not have is estimated over the others. One with values that are not finite has no
    average and is left out.
    """
    own = {ACCURACIES: column(pairs, CORRECT)} | {
        name: _fractions(name, pairs[name].drop_null().to_numpy())
        for name in pairs.column_names
        if name not in (*KEYS, CORRECT, ACCURACIES) and not name.startswith((EXCHANGED, BLANK))
    }
    own = {name: values for name, values in own.items() if len(values) and np.isfinite(values).all()}
    found: dict[str, Estimate] = {}
    for count in dict.fromkeys(map(len, own.values())):  # resamples are drawn once for figures of as many pairs
        same = {name: values for name, values in own.items() if len(values) == count}
        found |= zip(same, mean_estimates(list(same.values())), strict=True)
    found = {name: found[name] for name in own}
    for name in (EXCHANGED, BLANK):
        if (unseen := f"{name}/{CORRECT}") in pairs.column_names:
            seen_both, unseen_both = both(pairs, unseen)
            if len(seen_both):
                gap = seen_both.astype(np.float64) - unseen_both
                found[f"rewards/accuracies_{name}"] = mean_estimate(unseen_both)
                found[GAP if name == EXCHANGED else f"grounding_{name}_gap"] = mean_estimate(gap)
    return found


def _fractions(name: str, values: np.ndarray) -> np.ndarray:
    """Return the values of a metric that is a fraction of pairs as booleans, whose interval ends at 0 and 1."""
    return values.astype(bool) if name.endswith(_FRACTIONS) and np.isin(values, (0, 1)).all() else values


def column(pairs: pa.Table, name: str) -> np.ndarray:
    """Return a column without nulls as an array."""
    values: np.ndarray = pairs[name].to_numpy()
    return values


def both(pairs: pa.Table, unseen: str) -> tuple[np.ndarray, np.ndarray]:
    """Return whether the model is right with a pair's own images, and with others, for pairs scored with both."""
    valid = pairs[unseen].is_valid().to_numpy()
    return column(pairs, CORRECT)[valid].astype(bool), pairs[unseen].drop_null().to_numpy().astype(bool)


def length_groups(pairs: pa.Table) -> list[str]:
    """Name for each pair which third of the pairs it is in, by the tokens of its longer answer."""
    tokens = np.maximum(column(pairs, "chosen_tokens"), column(pairs, "rejected_tokens"))
    thirds = np.quantile(tokens, [1 / 3, 2 / 3]).astype(int).tolist()
    edges = sorted({int(tokens.min()) - 1, *thirds, int(tokens.max())})
    names = [f"{low + 1:,} to {high:,} tokens" for low, high in pairwise(edges)]
    places = np.searchsorted(edges, tokens, side="left") - 1
    return [names[place] for place in places.tolist()]


def longer_answer(pairs: pa.Table) -> list[str]:
    """Name for each pair which answer has more tokens."""
    signs = np.sign(column(pairs, "chosen_tokens").astype(np.int64) - column(pairs, "rejected_tokens"))
    return [("rejected is longer", "equally long", "chosen is longer")[sign + 1] for sign in signs.tolist()]


def _groups(pairs: pa.Table, names: Sequence[str]) -> list[Group]:
    """Estimate accuracy, margin and gap of each group, by name; groups of numbers by their first number."""
    labels = np.array(names, dtype=object)
    groups = []
    for name in sorted(set(names), key=lambda name: (name == OTHER, _first_number(name), name)):
        rows = pairs.filter(pa.array((labels == name).tolist()))
        accuracy = mean_estimate(column(rows, CORRECT).astype(bool))
        margin = None
        if MARGINS in rows.column_names and np.isfinite(column(rows, MARGINS)).all():
            margin = mean_estimate(column(rows, MARGINS))
        gap = None
        if (unseen := f"{EXCHANGED}/{CORRECT}") in rows.column_names:
            seen_both, unseen_both = both(rows, unseen)
            gap = mean_estimate(seen_both.astype(np.float64) - unseen_both) if len(seen_both) else None
        groups.append(Group(name, accuracy, margin, gap))
    return groups


def _first_number(name: str) -> int:
    word = name.split(" ", 1)[0].replace(",", "")
    return int(word) if word.isdecimal() else -1


def compare_tables(pairs: pa.Table, base: pa.Table) -> Comparison | None:
    """Compare two tables on the pairs that both have; None if there are none."""
    ours, theirs = common(pairs, base)
    if not ours.num_rows:
        return None
    both_have = all(MARGINS in table.column_names and np.isfinite(table[MARGINS]).all() for table in (ours, theirs))
    margins = MARGINS if both_have else CORRECT
    return compare(
        column(ours, CORRECT).astype(bool),
        column(ours, margins).astype(np.float64),
        column(theirs, CORRECT).astype(bool),
        column(theirs, margins).astype(np.float64),
    )


def common(pairs: pa.Table, base: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the rows of the pairs that both tables have, in the same order."""
    _, ours, theirs = np.intersect1d(
        pairs["sample_index"].to_numpy(), base["sample_index"].to_numpy(), assume_unique=True, return_indices=True
    )
    return pairs.take(pa.array(ours)), base.take(pa.array(theirs))


def doubt_between(best: tuple[str, pa.Table], other: tuple[str, pa.Table], metric: str) -> str | None:
    """Say that the held-out pairs do not tell two models apart by a metric; None if they do.

    Args:
        best: name and table of the model with the better average.
        other: the same of another model, scored on the same pairs.
        metric: `eval/...`.
    """
    name = metric.removeprefix("eval/")
    ours, theirs = common(best[1], other[1])
    if name not in ours.column_names or name not in theirs.column_names:
        return None
    have = pa.array(ours[name].is_valid().to_numpy() & theirs[name].is_valid().to_numpy())
    ours, theirs = ours.filter(have), theirs.filter(have)
    if not ours.num_rows:
        return None
    found = mean_estimate(column(ours, name).astype(np.float64) - column(theirs, name))
    if not found.contains(0.0):
        return None
    return (
        f"{best[0]} cannot be told from {other[0]} on {found.pairs:,} held-out pairs: their {metric} differs by "
        f"{found.value:+.4f} (95 % interval {found.low:+.4f} to {found.high:+.4f}). More pairs can tell"
    )


def judge_accuracy(accuracy: Estimate) -> Verdict:
    """Say whether the model prefers the chosen answers more often than chance would."""
    text = f"the chosen answer is the more likely one in {percent(accuracy.value)} of {accuracy.pairs:,} pairs"
    text += f" (95 % interval {percent(accuracy.low)} to {percent(accuracy.high)})"
    if accuracy.contains(CHANCE):
        return Verdict("warning", "Not distinguishable from chance", text)
    if accuracy.value < CHANCE:
        return Verdict("problem", "Worse than chance, as if chosen and rejected were exchanged", text)
    return Verdict("good", ACCURATE, text)


def judge_grounding(figures: Mapping[str, Estimate]) -> Verdict | None:
    """Say whether the model uses its images; None if that was not measured."""
    gap, unseen = figures.get(GAP), figures.get(f"rewards/accuracies_{EXCHANGED}")
    if gap is None or unseen is None:
        return None
    text = f"exchanging them between pairs costs {points(gap.value)} of accuracy"
    text += f" (95 % interval {points(gap.low)} to {points(gap.high)})"
    if gap.low > 0:
        if unseen.low > CHANCE and gap.value < unseen.value - CHANCE:
            text += f", and without the right ones it is still right in {percent(unseen.value)} of the pairs"
            return Verdict("warning", "The model uses its images little", text)
        return Verdict("good", "The model uses its images", text)
    if gap.high <= SMALL_GAP:
        return Verdict("problem", "The model does not use its images", text)
    return Verdict("warning", "Too few pairs to say whether the model uses its images", text)


def judge_comparison(found: Comparison, base: str) -> Verdict:
    """Say whether the model is better than another one on the same pairs."""
    difference, p = found.accuracy, found.p_accuracy
    text = f"{points(difference.value, sign=True)} of accuracy on the same {difference.pairs:,} pairs"
    text += f" (95 % interval {points(difference.low, sign=True)} to {points(difference.high, sign=True)}, {p_text(p)})"
    if p < 0.05:
        better = difference.value > 0
        return Verdict("good" if better else "problem", f"{'Better' if better else 'Worse'} than {base}", text)
    return Verdict("warning", f"No difference to {base} is shown", text)


def p_text(p: float) -> str:
    """Format a p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def percent(fraction: float) -> str:
    """Format a fraction with one digit: 0.923 as 92.3 %."""
    return f"{100 * fraction:.1f} %"


def points(fraction: float, sign: bool = False) -> str:
    """Format a difference of fractions in percentage points."""
    value = 100 * fraction
    return f"{value:+.1f} points" if sign else f"{value:.1f} points"
