"""Figures of a data check by language and by domain, and warnings of those that training would hardly see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data_report.facts import PairFacts
from orpo_ray.pages.text_format import number, percent

MOST_GROUPS = 50
"""Languages, and domains, in a report; the rows of the others are together."""
OTHER = "other"
MOSTLY = 0.5
"""A group of which more than this fraction is too long is warned of."""
TOO_LONG = "too_long"

Groups = list[dict[str, Any]]


def figures_by(kind: str, facts: Sequence[PairFacts], bad: Sequence[BadRow], max_length: int) -> Groups:
    """Summarize the rows of each language or each domain, those with the most rows first.

    Args:
        kind: `language` or `domain`.
        facts: of the pairs.
        bad: bad rows; those that are too long to be tokenized count as too long, the others not at all.
        max_length: the recipe's `data.max_length`.

    Returns:
        Of each group its `name`, its number of `rows`, `tokens_per_character` of the answers (None without characters),
        the number of rows that are `too_long` and their `fraction`, and `p95_tokens`, the length that 95 % of its pairs
        do not exceed (None without any). Empty if no row has a group.
    """
    pairs: dict[str, list[PairFacts]] = defaultdict(list)
    unread: dict[str, int] = defaultdict(int)
    for each in facts:
        if (name := getattr(each, kind)) is not None:
            pairs[name].append(each)
    for row in bad:
        if row.reason == TOO_LONG and (name := getattr(row, kind)) is not None:
            unread[name] += 1
    sizes = {name: len(pairs.get(name, ())) + unread.get(name, 0) for name in {**pairs, **unread}}
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    if len(names) > MOST_GROUPS:
        names, rest = names[: MOST_GROUPS - 1], names[MOST_GROUPS - 1 :]
        pairs[OTHER] = [each for name in rest for each in pairs.get(name, ())]
        unread[OTHER] = sum(unread.get(name, 0) for name in rest)
        names.append(OTHER)
    return [_group(name, pairs.get(name, []), unread.get(name, 0), max_length) for name in names]


def _group(name: str, pairs: Sequence[PairFacts], unread: int, max_length: int) -> dict[str, Any]:
    characters, tokens = (sum(each.answers[place] for each in pairs) for place in (0, 1))
    lengths = np.array([each.sequence for each in pairs], np.int64)
    too_long = int((lengths > max_length).sum()) + unread
    rows = len(pairs) + unread
    return {
        "name": name,
        "rows": rows,
        "tokens_per_character": tokens / characters if characters else None,
        "too_long": too_long,
        "fraction": too_long / rows,
        # Pairs that are too long to be tokenized have no number of tokens.
        "p95_tokens": int(np.percentile(lengths, 95, method="higher")) if unread <= 0.05 * rows else None,
    }


def warnings_of_groups(split: Mapping[str, Any], max_length: int) -> list[str]:
    """Warn of each language and domain of which most pairs are skipped or cut for their length.

    Args:
        split: report of the split.
        max_length: the recipe's `data.max_length`.
    """
    policy = split["too_long"]["policy"]
    if policy == "error":  # training says so at the first one
        return []
    consequence = "are skipped" if policy == "skip" else "have their answers cut or are skipped"
    found = []
    for kind, groups in (("language", split["languages"]), ("domain", split["domains"])):
        for group in groups:
            if group["fraction"] > MOSTLY:
                found.append(
                    f"most pairs of the {kind} {group['name']} {consequence} for their length: "
                    f"{number(group['too_long'])} of {number(group['rows'])} ({percent(group['fraction'])}) exceed "
                    f"data.max_length ({number(max_length)} tokens). {_fix(kind, group, groups)}"
                )
    return found


def _fix(kind: str, group: Mapping[str, Any], groups: Groups) -> str:
    enough = group["p95_tokens"]
    text = f"To keep 95 % of them, set data.max_length={enough}" if enough else "Increase data.max_length"
    density = [each["tokens_per_character"] for each in groups if each["tokens_per_character"]]
    own = group["tokens_per_character"]
    if kind == "language" and own and own >= 2 * min(density):
        text += (
            f", or use a model whose tokenizer knows this language: here an answer takes {own:.2f} tokens per "
            f"character, and {min(density):.2f} in another language"
        )
    return f"{text}."
