"""The held-out pairs that a report shows: those that improved most and least, or the clearest and the worst."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, pair_at
from orpo_ray.errors import OrpoRayError
from orpo_ray.evaluation.pair_scores import CORRECT, facts_of_table
from orpo_ray.evaluation.summary import MARGINS, common
from orpo_ray.pages.thumbnails import thumbnail
from orpo_ray.report.run_data import RunData

SHOWN = 6
"""Pairs of each kind."""


def shown_pairs(run: RunData) -> tuple[list[dict[str, Any]], str | None]:
    """Choose pairs and read their texts and images.

    Returns:
        The pairs as the page's template takes them, and why there are none or only a part of them; None if all is well.
    """
    if run.pairs is None or MARGINS not in run.pairs.column_names:
        return [], "The run kept no scores of single pairs. orpo-ray evaluate RUN writes them."
    rows = list(_chosen_rows(run.pairs, run.start_pairs))
    try:
        read = held_out_data(run.recipe)
    except (OrpoRayError, OSError) as error:
        return [], f"The held-out data cannot be read any longer: {error}"
    if read is None or read.digest != facts_of_table(run.pairs).get("data"):
        return [], "The held-out data has changed since the pairs were scored."
    return [entry for row in rows if (entry := _entry(run, read, row)) is not None], None


def _chosen_rows(pairs: pa.Table, start: pa.Table | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of the pairs to show, with `why` and the margins before and after."""
    if start is not None and MARGINS in start.column_names:
        pairs, before = common(pairs, start)
        change = pairs[MARGINS].to_numpy() - before[MARGINS].to_numpy()
        names = ("improved most", "improved least")
        start_margins = before[MARGINS].to_pylist()
    else:
        change, names = pairs[MARGINS].to_numpy(), ("clearest", "most wrong")
        start_margins = [None] * pairs.num_rows
    order = np.argsort(change)
    order = order[np.isfinite(change[order])]
    count = min(SHOWN, len(order) // 2)
    for name, places in ((names[0], order[::-1][:count]), (names[1], order[:count])):
        for place in places.tolist():
            (row,) = pairs.slice(place, 1).to_pylist()
            yield row | {"why": name, "start": start_margins[place]}


def _entry(run: RunData, read: ReadSpec, row: dict[str, Any]) -> dict[str, Any] | None:
    """Return a pair for the page's template; None if its row cannot be read."""
    shard, pair = pair_at(read, row["sample_index"])
    if not isinstance(pair, PreferencePair):
        return None
    root, allow_http = read.root_of(shard), run.recipe.data.allow_http
    logps = {side: row.get(f"logps/{side}") for side in ("chosen", "rejected")}
    return {
        "id": pair.id,
        "source": pair.source,
        "why": row["why"],
        "kinds": ["right" if row[CORRECT] else "wrong"],
        "images": [thumbnail(image, root, allow_http) for image in pair.images],
        "rejected_images": [thumbnail(image, root, allow_http) for image in pair.rejected_images or ()],
        "prompt": [
            {"role": turn["role"], "text": "\n".join(p["text"] for p in turn["content"] if p["type"] == "text")}
            for turn in pair.prompt
        ],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "tokens": {"chosen": row["chosen_tokens"], "rejected": row["rejected_tokens"]},
        "logps": logps,
        "margin": row[MARGINS],
        "start": row["start"],
        "exchanged": row.get(f"exchanged/{MARGINS}"),
    }
