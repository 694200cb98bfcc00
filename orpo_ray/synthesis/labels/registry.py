"""The labels by their names in a recipe."""

from __future__ import annotations

from collections.abc import Callable

from orpo_ray.config.synthesis import Label
from orpo_ray.synthesis.labels.base import Labeller, Tools
from orpo_ray.synthesis.labels.corruption import Corruption
from orpo_ray.synthesis.labels.grounding import Grounding
from orpo_ray.synthesis.labels.judged import Judged
from orpo_ray.synthesis.labels.reference import Reference

LABELS: dict[Label, Callable[[Tools], Labeller]] = {
    "grounding": Grounding,
    "reference": Reference,
    "judge": Judged,
    "corruption": Corruption,
}


def make_label(tools: Tools) -> Labeller:
    """Make the label that a recipe names."""
    return LABELS[tools.recipe.synthesize.label](tools)
