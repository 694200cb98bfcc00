"""The command that a job runs, and what it asks of the cluster."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.storage.files import is_remote
from orpo_ray.training.placement import ACCELERATOR

OF_RECIPES = ("train", "tune", "data check", "data prepare")
OF_RUNS = ("evaluate", "export")
TRAINING = ("train", "tune")
# Enough that Ray chooses a node with such a GPU, as for the workers of a run.
_SOME = 0.001


@dataclass(frozen=True)
class Entrypoint:
    """What a job runs."""

    command: str
    """The command of orpo-ray."""
    line: str
    """The line that a shell on the driver's node reads."""
    resources: dict[str, Any] = field(default_factory=dict)
    """Arguments of `JobSubmissionClient.submit_job` for the driver's node."""


def entrypoint_of(given: str, name: str, overrides: Sequence[str], recipe: Recipe) -> Entrypoint:
    """Return what runs a command of orpo-ray on a recipe, or on the recipe's run.

    Args:
        given: the command and its options, as `evaluate --generate 8`.
        name: of the recipe's file, relative to the working directory.
        overrides: `FIELD=VALUE` strings.
        recipe: with the overrides.

    Raises:
        UserError: jobs do not run this command.
    """
    command, options = _parse(given)
    words = ["python", "-m", "orpo_ray", *command.split()]
    if command in OF_RECIPES:
        return Entrypoint(command, shlex.join([*words, name, *overrides, *options]), {"entrypoint_num_gpus": 0})
    fields = overrides if command == "evaluate" else ()
    line = " ".join([shlex.join(words), _run_of(recipe), shlex.join([*fields, *options])]).rstrip()
    return Entrypoint(command, line, _of_a_worker(recipe) if command == "evaluate" else {"entrypoint_num_gpus": 0})


def _parse(given: str) -> tuple[str, list[str]]:
    """Divide into a command and its options. Raises UserError."""
    commands = (*OF_RECIPES, *OF_RUNS)
    try:
        words = shlex.split(given)
    except ValueError:  # an open quote
        words = []
    for command in commands:
        parts = command.split()
        if words[: len(parts)] == parts:
            return command, words[len(parts) :]
    raise UserError("cannot be submitted", field="--command", value=given, fix=f"use one of {', '.join(commands)}")


def _run_of(recipe: Recipe) -> str:
    """Return a recipe's run folder for a shell. Where a job trains, a relative one is in the home folder."""
    storage = recipe.checkpoint.storage
    if is_remote(storage) or os.path.isabs(storage):
        return shlex.quote(f"{storage.rstrip('/')}/{recipe.name}")
    relative = storage.removeprefix("~/").removeprefix("./").rstrip("/")
    return '"$HOME"/' + shlex.quote(f"{relative}/{recipe.name}")


def _of_a_worker(recipe: Recipe) -> dict[str, Any]:
    """Return the resources for a driver that computes: those of one worker, so that a GPU node runs it."""
    scaling = recipe.scaling
    wanted = scaling.gpus_per_worker
    gpus = (1 if scaling.accelerator_type else 0) if wanted == "auto" else wanted
    found: dict[str, Any] = {"entrypoint_num_gpus": gpus}
    if scaling.accelerator_type:
        found["entrypoint_resources"] = {ACCELERATOR + scaling.accelerator_type: _SOME}
    if scaling.labels:
        found["entrypoint_label_selector"] = scaling.labels
    return found
