"""Which checkpoint a run resumes from: the newest whole one, or one chosen by hand; and removal of all that is too old.

The folders in the run folder are the only record of the checkpoints. Ray Train's own record is not used: it is written
in place, and a damaged one would end every later start.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.training.manifest import Damage, check_content, check_sizes, manifest_name

PREFIX = "checkpoint_"
SAVING = ".saving"
"""Folder in a local run folder where workers write what they have not published yet."""
FROM_CHECKPOINT = "--from-checkpoint"
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's record of checkpoints, which earlier versions of this package had it write."""


@dataclass(frozen=True)
class Inspected:
    """A checkpoint whose every byte was checked."""

    name: str
    """Of its folder in the run folder."""
    step: int | None
    """Steps done; None if it is damaged."""
    damage: str = ""
    """Why it cannot be used; empty if it is whole."""

    def __str__(self) -> str:
        return f"{self.name}: {self.damage or f'step {self.step:,}, whole'}"


def new_name(existing: Iterable[str]) -> str:
    """Return a name, by the time of day, that sorts after all existing ones, whatever clock they were made by."""
    name = f"{PREFIX}{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"
    newest = max(existing, default="")
    return name if name > newest else f"{newest}_1"


def checkpoint_names(run: RunFolder) -> list[str]:
    """Return the names of a run's checkpoints, whole or not, newest first. Raises OSError."""
    return sorted((name for name in run.list_folders() if name.startswith(PREFIX)), reverse=True)


def inspect(run: RunFolder, name: str) -> Inspected:
    """Check every byte of a checkpoint. Raises OSError."""
    try:
        return Inspected(name, check_content(run, name)[0].step)
    except Damage as damage:
        return Inspected(name, None, str(damage))


def choose_newest(run: RunFolder, warn: Callable[[str], None]) -> str | None:
    """Return the name of the newest whole checkpoint; None if there is none.

    Args:
        run: the run folder.
        warn: takes a sentence about every damaged checkpoint that is newer.

    Raises:
        OSError: the store cannot be read now.
    """
    damaged = False
    for name in checkpoint_names(run):
        found = inspect(run, name)
        if not found.damage:
            return name
        damaged = True
        warn(f"checkpoint {run.uri}/{name} is not used: {found.damage}")
    if damaged:
        warn(f"no checkpoint in {run.uri} is whole, so the run begins at step 0")
    return None


def choose_by_hand(run: RunFolder, wanted: str) -> None:
    """Make a checkpoint the newest one of its run, by deleting those that are newer.

    Args:
        run: the run folder.
        wanted: name of the checkpoint, or its path or URI.

    Raises:
        UserError: it is not a checkpoint of this run, or it is damaged.
    """
    names = checkpoint_names(run)
    above, _, name = wanted.rstrip("/").rpartition("/")
    is_elsewhere = bool(above) and above != run.uri and Path(above).resolve() != Path(run.uri).resolve()
    found = inspect(run, name) if name in names and not is_elsewhere else None
    if found is None or found.damage:
        states = [inspect(run, each) for each in names]
        raise UserError(
            "not a checkpoint of this run" if found is None else f"the checkpoint is damaged: {found.damage}",
            field=FROM_CHECKPOINT,
            value=wanted,
            fix=f"choose one in {run.uri}: " + "; ".join(str(state) for state in states)
            if states
            else f"leave it out; {run.uri} has no checkpoints",
        )
    for newer in names[: names.index(name)]:
        run.delete(newer)


def forget_ray_snapshot(run: RunFolder) -> None:
    """Delete an earlier version's record by Ray Train, which refuses to start where it does not fit the folders.

    Raises:
        UserError: an earlier version wrote all checkpoints of the run, so none has a manifest.
    """
    if not run.has(RAY_SNAPSHOT):
        return
    names = checkpoint_names(run)
    if names and not any(run.has(f"{name}/{manifest_name(0)}") for name in names):
        raise UserError(
            "an earlier version of orpo-ray wrote the run's checkpoints",
            field=run.uri,
            fix="finish the run with that version, or start a new run under another name (name=...)",
        )
    run.delete(RAY_SNAPSHOT)


def clean(run: RunFolder, chosen: str, keep: int) -> None:
    """Delete all checkpoints but the chosen one and the complete ones before it, `keep` in all. Raises OSError."""
    kept = [chosen]
    for name in checkpoint_names(run):
        if name < chosen and len(kept) < keep and _is_complete(run, name):
            kept.append(name)
        if name not in kept:
            run.delete(name)


def clear_saving(run: RunFolder) -> None:
    """Delete what killed workers wrote and did not publish. No worker of the run may be saving."""
    if not run.is_remote:
        shutil.rmtree(run.path / SAVING, ignore_errors=True)


def prune(run: RunFolder, keep: int) -> None:
    """Delete all but the newest checkpoints, `keep` of them, after a new one was saved. Raises OSError."""
    for name in checkpoint_names(run)[keep:]:
        run.delete(name)


def _is_complete(run: RunFolder, name: str) -> bool:
    try:
        check_sizes(run, name)
    except Damage:
        return False
    return True
