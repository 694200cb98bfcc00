"""The model's own answers that a report shows: those to the same held-out pair side by side, over steps or runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, pair_at
from orpo_ray.errors import OrpoRayError
from orpo_ray.pages.thumbnails import thumbnail
from orpo_ray.report.run_data import RunData

PAIRS, STEPS = 12, 5
"""At most that many are shown."""
START = "before training"


def shown_generations(run: RunData) -> list[dict[str, Any]]:
    """Return the pairs with the run's answers over its steps, as the page's template takes them."""
    read = _held_out(run) if run.generations else None
    return [
        _entry(run, read, [(f"{step:,}", lines[step]) for step in spread(list(lines))])
        for lines in list(run.generations.values())[:PAIRS]
    ]


def compared_generations(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return the pairs that at least two runs answered, with the latest answers of each, as the template takes them.

    Those of the first run's model before training come first, if there are any.
    """
    answered: dict[tuple[int, object], list[RunData]] = {}
    for run in runs:
        for index, lines in run.generations.items():
            answered.setdefault((index, _data(lines)), []).append(run)
    found: list[dict[str, Any]] = []
    for (index, _), both in answered.items():
        if len(both) > 1 and len(found) < PAIRS:
            first = both[0].generations[index]
            start = [(START, first[0])] if 0 in first else []
            latest = [(run.name, run.generations[index][max(run.generations[index])]) for run in both]
            found.append(_entry(both[0], _held_out(both[0]), start + latest))
    return found


def _data(lines: dict[int, dict[str, Any]]) -> object:
    """Return the digest of the held-out data that a pair is of."""
    return lines[max(lines)]["data"]


def _held_out(run: RunData) -> ReadSpec | None:
    try:
        return held_out_data(run.recipe)
    except (OrpoRayError, OSError):
        return None  # the texts are in the run folder


def _entry(run: RunData, read: ReadSpec | None, answers: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    last = answers[-1][1]
    images: list[str] = []
    if read is not None and read.digest == last["data"] and last["sample_index"] < read.end_sample:
        shard, pair = pair_at(read, last["sample_index"])
        if isinstance(pair, PreferencePair):
            root, allow_http = read.root_of(shard), run.recipe.data.allow_http
            images = [thumbnail(image, root, allow_http) for image in pair.images]
    return {
        "id": last["id"],
        "images": images,
        "prompt": last["prompt"],
        "chosen": last["chosen"],
        "rejected": last["rejected"],
        "answers": [{"by": by, "greedy": line["greedy"], "sampled": line["sampled"]} for by, line in answers],
    }


def spread(steps: list[int]) -> list[int]:
    """Choose the first step, the last one, and some between them at equal distances."""
    if len(steps) <= STEPS:
        return steps
    return [steps[round(place * (len(steps) - 1) / (STEPS - 1))] for place in range(STEPS)]
