"""What the runs of one process are given. Nothing heavy is imported here, since a sweep's driver imports this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.reading import ReadSpec
from orpo_ray.training.resources import Resources


@dataclass(frozen=True)
class HostedRuns:
    """Runs that train side by side in one process, or a single run."""

    recipes: dict[str, dict[str, Any]]
    """Of each run, by name, as mappings, with absolute paths."""
    train: ReadSpec
    held_out: ReadSpec
    num_steps: int
    """Optimizer steps of each run."""
    resources: Resources
    """Of the process."""

    def folder_of(self, name: str) -> str:
        """Return the path or URI of a run folder."""
        return parse_recipe(self.recipes[name]).run_uri
