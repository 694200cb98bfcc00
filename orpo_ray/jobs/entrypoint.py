"""The command that a job runs, and what it asks of the cluster."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.storage.files import is_remote
from orpo_ray.training.placement import ACCELERATOR

OF_RECIPES = ("train", "tune", "iterate", "data check", "data prepare", "data synthesize", "doctor")
OF_RUNS = ("evaluate", "export")
# Enough that Ray chooses a node with such a GPU, as for the workers of a run.
_SOME = 0.001
_NONE: dict[str, Any] = {"entrypoint_num_gpus": 0}  # for a driver that only waits, which Ray runs on the head node


@dataclass(frozen=True)
class Entrypoint:
    """What a job runs, and where."""

    command: str
    """The command of orpo-ray."""
    line: str
    """The line that a shell on the driver's node reads."""
    resources: dict[str, Any]
    """Arguments of `JobSubmissionClient.submit_job` for the driver's node."""


def entrypoint_of(given: str, name: str, overrides: Sequence[str], recipe: Recipe) -> Entrypoint:
    """Return what runs a command of orpo-ray on a recipe, or on the recipe's run.

    Args:
        given: the command with its options, and with fields for an evaluation, as `evaluate --generate 8`.
        name: of the recipe's file, relative to the working directory.
        overrides: `FIELD=VALUE` strings of the recipe.
        recipe: with the overrides.

    Raises:
        UserError: jobs do not run this command, or not where the run is.
    """
    command, options = _parse(given)
    words = ["python", "-m", "orpo_ray", *command.split()]
    if command in OF_RECIPES:
        return Entrypoint(command, shlex.join([*words, name, *overrides, *options]), _NONE)
    resources = _NONE
    if command == "evaluate":
        resources = _of_a_worker(recipe)
        _check_place(recipe, resources)
        given_options = {each.partition("=")[0] for each in options}
        loads_judge = "--judge-model" in given_options and "--judge" not in given_options
        if "--workers" in given_options and not loads_judge:  # the driver only waits for them
            resources = _NONE
    return Entrypoint(command, " ".join([shlex.join(words), _run_of(recipe), shlex.join(options)]).rstrip(), resources)


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
    if _is_shared(storage):
        return shlex.quote(f"{storage.rstrip('/')}/{recipe.name}")
    if storage.startswith("~") and storage != "~" and not storage.startswith("~/"):
        fix = "give a path without ~USER"
        raise UserError("no job can find another user's folder", field="checkpoint.storage", value=storage, fix=fix)
    relative = os.path.normpath(storage.removeprefix("~").lstrip("/") or ".")
    return '"$HOME"/' + shlex.quote(f"{relative}/{recipe.name}".removeprefix("./"))


def _is_shared(storage: str) -> bool:
    """Whether a storage is the same on all nodes, as far as its name tells."""
    return is_remote(storage) or os.path.isabs(storage)


def _check_place(recipe: Recipe, resources: dict[str, Any]) -> None:
    """Check that an evaluation on a worker's node finds a run, which a job has written. Raises UserError."""
    storage = recipe.checkpoint.storage
    if resources != _NONE and not _is_shared(storage):
        raise UserError(
            "the run is in the home folder of the head node, and the evaluation would run on another node",
            field="checkpoint.storage",
            value=storage,
            fix="train with a storage that all nodes share, or set scaling.gpus_per_worker=0 to evaluate on the head",
        )


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
