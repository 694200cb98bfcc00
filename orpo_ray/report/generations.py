"""The model's own answers that a report shows: those to the same held-out pair side by side, over the steps."""

from __future__ import annotations

from typing import Any

from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, pair_at
from orpo_ray.errors import OrpoRayError
from orpo_ray.pages.thumbnails import thumbnail
from orpo_ray.report.run_data import RunData

PAIRS, STEPS = 12, 5
"""At most that many are shown."""


def shown_generations(run: RunData) -> list[dict[str, Any]]:
    """Return the pairs with their answers as the page's template takes them."""
    if not run.generations:
        return []
    try:
        read = held_out_data(run.recipe)
    except (OrpoRayError, OSError):
        read = None  # the texts are in the run folder
    return [_entry(run, read, lines) for lines in list(run.generations.values())[:PAIRS]]


def _entry(run: RunData, read: ReadSpec | None, lines: dict[int, dict[str, Any]]) -> dict[str, Any]:
    steps = spread(list(lines))
    last = lines[steps[-1]]
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
        "steps": [{"step": step, "greedy": lines[step]["greedy"], "sampled": lines[step]["sampled"]} for step in steps],
    }


def spread(steps: list[int]) -> list[int]:
    """Choose the first step, the last one, and some between them at equal distances."""
    if len(steps) <= STEPS:
        return steps
    return [steps[round(place * (len(steps) - 1) / (STEPS - 1))] for place in range(STEPS)]
