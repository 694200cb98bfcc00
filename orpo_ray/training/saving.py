"""Save checkpoints: look for room, write every worker's files, and publish them with its manifest last."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.objective.collectives import gather_objects
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.storage.scratch import make_scratch
from orpo_ray.training.checkpoint import POSITION_FILE, Position
from orpo_ray.training.checkpoint_choice import SAVING, checkpoint_names, new_name, prune
from orpo_ray.training.divergence import FIX, TrainingDiverged
from orpo_ray.training.engine import Engine, SavesAlone
from orpo_ray.training.manifest import Manifest, manifest_name, write_manifest
from orpo_ray.training.unlogged import LOG_FILE, LogLine, write_log

ROOM_WAITS_S = (1.0, 3.0)
"""Seconds between looks for room, before a run ends for lack of it."""
_FULL_BYTES = 1 << 20  # with less room than this, a disk counts as full


class SaveFailed(OrpoRayError):
    """A checkpoint could not be written, and a restart would not change that."""


class Saver:
    """One worker's part in the saving of checkpoints. Every worker has one.

    Making one is a collective.

    Args:
        recipe: the resolved recipe.
        engine: tells the size of the first checkpoint.
        rank: of this worker.
        num_workers: of the run.
        workers_of_node: number of workers on this worker's node.

    Raises:
        UserError: a checkpoint does not fit into the scratch folder.
    """

    def __init__(self, recipe: Recipe, engine: Engine, rank: int, num_workers: int, workers_of_node: int) -> None:
        self._run, self._keep, self._rank, self._num_workers = (
            RunFolder(recipe.run_uri), recipe.checkpoint.keep, rank, num_workers
        )  # fmt: skip
        self._scratch_folder = recipe.checkpoint.scratch
        # All workers write into a local run folder. Into a remote one each writes by way of its own disk.
        self._expected_bytes = engine.checkpoint_bytes
        if self._run.is_remote:
            check_scratch(engine, self._scratch_folder, workers_of_node)
        else:
            self._expected_bytes = sum(gather_objects(engine.checkpoint_bytes))

    def save(self, engine: Engine, position: Position) -> None:
        """Save a checkpoint, and delete those that are too old. A collective.

        Raises:
            TrainingDiverged: a weight is not finite; earlier checkpoints are kept.
            SaveFailed: there is no room, or the store refuses; earlier checkpoints are kept.
        """
        if not engine.has_finite_weights():
            raise TrainingDiverged(
                f"a weight is not finite after step {position.step:,}; the last checkpoint is kept\n  fix: {FIX}"
            )
        with self._one_message(position.step):
            mine = new_name(checkpoint_names(self._run)) if self._rank == 0 else None
        name = gather_objects(mine)[0]
        with self._one_message(position.step), self._scratch() as scratch:
            self._wait_for_room(scratch)
            with _full_disk_as_os_error(scratch):
                engine.save(scratch)
            if self._rank == 0:
                (scratch / POSITION_FILE).write_text(json.dumps(asdict(position)))
            manifest = write_manifest(scratch, position.step, self._rank, self._num_workers)
            self._publish(scratch, name, manifest)
        written = gather_objects(manifest.num_bytes)  # waits until all have published
        self._expected_bytes = manifest.num_bytes if self._run.is_remote else sum(written)
        if self._rank == 0:
            with self._one_message(position.step):
                prune(self._run, self._keep)

    def save_alone(self, engine: SavesAlone, position: Position, updates: int, lines: Sequence[LogLine]) -> bool:
        """Save a checkpoint without the other workers, and from another thread than the one that trains.

        Args:
            engine: holds the whole state.
            position: of the run.
            updates: number of updates that belong to the position.
            lines: what was logged since the last checkpoint; rank 0 may be lost before it could.

        Returns:
            Whether it was saved.

        Raises:
            SaveFailed: there is no room, or the store refuses; earlier checkpoints are kept.
        """
        with self._one_message(position.step), self._scratch() as scratch:
            self._wait_for_room(scratch)
            with _full_disk_as_os_error(scratch):
                if not engine.save_alone(scratch, updates):
                    return False
            (scratch / POSITION_FILE).write_text(json.dumps(asdict(position)))
            write_log(scratch / LOG_FILE, lines)
            manifest = write_manifest(scratch, position.step, rank=0, num_workers=1)
            self._publish(scratch, new_name(checkpoint_names(self._run)), manifest)
        return True

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Yield an empty folder: on the disk of a local run folder, so that publishing copies nothing."""
        if self._run.is_remote:
            folder = make_scratch(self._scratch_folder)
        else:
            if not self._run.path.is_dir():
                raise SaveFailed(
                    f"the run folder {self._run.uri} does not exist on this worker's node\n  fix: set "
                    "checkpoint.storage to a folder that every node can access, or to s3:// or gs://"
                )
            (self._run.path / SAVING).mkdir(exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{self._rank}-", dir=self._run.path / SAVING))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _wait_for_room(self, scratch: Path) -> None:
        if self._rank != 0 and not self._run.is_remote:
            return  # rank 0 looks for all
        for wait in (*ROOM_WAITS_S, None):
            free = shutil.disk_usage(scratch).free
            if free >= self._expected_bytes:
                return
            if wait is not None:
                time.sleep(wait)
        raise OSError(f"it needs {_megabytes(self._expected_bytes)}, and {scratch} has {_megabytes(free)} free")

    def _publish(self, scratch: Path, name: str, manifest: Manifest) -> None:
        """Move this worker's files into the checkpoint, the manifest last. Raises OSError."""
        last = manifest_name(manifest.rank)
        if self._run.is_remote:
            for file in (*manifest.files, last):
                self._run.upload(scratch / file, f"{name}/{file}")
            return
        target = self._run.path / name
        folders = {target, *((target / file).parent for file in manifest.files)}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for file in manifest.files:
            (scratch / file).replace(target / file)
        for folder in (*folders, self._run.path):
            _sync_folder(folder)
        (scratch / last).replace(target / last)
        _sync_folder(target)

    @contextmanager
    def _one_message(self, step: int) -> Iterator[None]:
        """Turn an error of the disk or the store, which lasts, into the message that ends the run."""
        try:
            yield
        except ConnectionError:  # of a lost worker
            raise
        except OSError as error:
            raise SaveFailed(
                f"the checkpoint of step {step:,} was not saved: {error}\n  fix: make room, or check the access to "
                f"{self._run.uri}; the same command then resumes from the previous checkpoint"
            ) from error


def check_scratch(engine: Engine, folder: str | None, workers_of_node: int) -> None:
    """Check that a checkpoint fits into the scratch folder.

    Args:
        engine: the engine of this worker.
        folder: the recipe's `checkpoint.scratch`.
        workers_of_node: workers that write into it at the same time.

    Raises:
        UserError: it does not fit, or the folder cannot be made.
    """
    path = Path(folder or tempfile.gettempdir())
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise UserError(
            f"cannot use the scratch folder: {error}",
            field="checkpoint.scratch",
            value=str(path),
            fix="give a folder on the disk of each node that the workers can write to",
        ) from None
    needed = engine.checkpoint_bytes * workers_of_node
    if needed > free:
        raise UserError(
            f"a checkpoint needs about {needed:,} bytes there, and {free:,} are free",
            field="checkpoint.scratch",
            value=str(path),
            fix="free some space, or give a folder on a larger disk of each node",
        )


@contextmanager
def _full_disk_as_os_error(folder: Path) -> Iterator[None]:
    """Torch's writer raises RuntimeError where a disk is full."""
    try:
        yield
    except RuntimeError as error:
        if shutil.disk_usage(folder).free >= _FULL_BYTES:
            raise
        raise OSError(f"no space left on the disk of {folder}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
