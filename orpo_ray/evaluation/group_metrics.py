"""Metrics of the held-out pairs of each language and each domain: `rewards/accuracies/language/ar`, and so on.

A language or a domain is as `data.language` and `data.domain` name it. They have metrics if there are at least two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from orpo_ray.data.groups import KINDS
from orpo_ray.evaluation.pair_scores import CORRECT, EXCHANGED

MOST_GROUPS = 20
"""Languages, and domains, with metrics of their own; the pairs of the others are together."""
OTHER = "other"
MARGINS = "rewards/margins"
_NOT_IN_A_NAME = re.compile(r"[^\w. -]")


def group_metrics(pairs: pa.Table) -> dict[str, float]:
    """Return accuracy, margin, number of pairs and, if measured, the grounding gap of each language and each domain.

    Args:
        pairs: table of pair scores.
    """
    found: dict[str, float] = {}
    for kind in KINDS:
        if kind not in pairs.column_names:
            continue
        names = np.array([name if name is None else plain(name) for name in pairs[kind].to_pylist()], dtype=object)
        counts = Counter(name for name in names if name is not None)
        if len(counts) < 2:
            continue
        names = np.array(most_common(names.tolist(), MOST_GROUPS), dtype=object)
        for name in sorted({name for name in names if name is not None}):
            found |= _metrics_of(pairs.filter(pa.array(names == name)), f"{kind}/{name}")
    return found


def most_common(names: Sequence[Any], most: int) -> list[Any]:
    """Replace all but the most frequent names by OTHER, so that there are at most so many; None stays."""
    counts = Counter(name for name in names if name is not None)
    if len(counts) <= most:
        return list(names)
    # The name breaks a tie, so that the order of the pairs does not.
    kept = set(sorted(counts, key=lambda name: (-counts[name], name))[: most - 1])
    return [name if name is None or name in kept else OTHER for name in names]


def plain(name: str) -> str:
    """Replace what trackers do not take in the name of a metric, or take for a part of its path."""
    return _NOT_IN_A_NAME.sub("_", name)


def _metrics_of(pairs: pa.Table, group: str) -> dict[str, float]:
    correct = pairs[CORRECT].to_numpy()
    found = {f"pairs/{group}": float(len(correct)), f"rewards/accuracies/{group}": float(correct.mean())}
    if MARGINS in pairs.column_names:
        found[f"{MARGINS}/{group}"] = float(pairs[MARGINS].to_numpy().mean())
    if (unseen := f"{EXCHANGED}/{CORRECT}") in pairs.column_names:
        both = pairs[unseen].is_valid().to_numpy()
        if both.any():
            gap = correct[both].astype(np.float64) - pairs[unseen].drop_null().to_numpy().astype(np.float64)
            found[f"grounding_gap/{group}"] = float(gap.mean())
    return found
