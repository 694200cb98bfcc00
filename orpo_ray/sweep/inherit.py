"""Let a new run begin with a checkpoint of another run."""

from __future__ import annotations

import shutil
import time

import pyarrow.fs as pafs

from orpo_ray.errors import OrpoRayError
from orpo_ray.storage.files import locate, with_retries
from orpo_ray.storage.run_folder import FINAL, RunFolder
from orpo_ray.training.checkpoint_choice import checkpoint_names, inspect

WAIT_SECONDS = 120.0
"""For a checkpoint that the other run is still writing."""
POLL_SECONDS = 0.5


class NoCheckpoint(OrpoRayError):
    """The other run has no whole checkpoint of the step."""


def inherit_checkpoint(donor: RunFolder, step: int, heir: RunFolder, wait_s: float = WAIT_SECONDS) -> None:
    """Copy the checkpoint of a step into the folder of a run that has none yet.

    Args:
        donor: the run folder to copy from; its run may be going on.
        step: of the checkpoint.
        heir: the run folder to copy to.
        wait_s: seconds to wait for the checkpoint.

    Raises:
        NoCheckpoint: the checkpoint does not exist, or is damaged.
    """
    heir.make()
    if heir.has_model(FINAL) or checkpoint_names(heir):
        return
    deadline = time.monotonic() + wait_s
    while (name := _name_of(donor, step)) is None:
        if time.monotonic() > deadline:
            raise NoCheckpoint(f"{donor.uri} has no whole checkpoint of step {step:,}")
        time.sleep(POLL_SECONDS)
    if not heir.is_remote:
        scratch = heir.path / f".{name}"
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(donor.path / name, scratch)
        scratch.rename(heir.path / name)
        return
    filesystem, source = locate(f"{donor.uri}/{name}", "checkpoint.storage")
    target = locate(f"{heir.uri}/{name}", "checkpoint.storage")[1]
    with_retries(pafs.copy_files, source, target, filesystem, filesystem)


def _name_of(run: RunFolder, step: int) -> str | None:
    """Return the name of a run's whole checkpoint of a step; None if it has none."""
    return next((name for name in checkpoint_names(run) if inspect(run, name).step == step), None)
