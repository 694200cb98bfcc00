"""Save checkpoints: look for room, write every worker's files, and publish them with its manifest last.

Into an object store, files are uploaded beside the training, by a thread.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
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

    Attributes:
        pending: step of the checkpoint that some worker may still be uploading; None if the last one is whole.

    Raises:
        UserError: a checkpoint does not fit into the scratch folder.
    """

    def __init__(self, recipe: Recipe, engine: Engine, rank: int, num_workers: int, workers_of_node: int) -> None:
        self._run, self._keep, self._rank, self._num_workers = (
            RunFolder(recipe.run_uri), recipe.checkpoint.keep, rank, num_workers
        )  # fmt: skip
        self._scratch_folder = recipe.checkpoint.scratch
        self.pending: int | None = None
        self._thread = ThreadPoolExecutor(1, "upload")  # one upload at a time, so that scratch holds one checkpoint
        self._task: Future[None] | None = None
        self._newest = ""  # the name of the newest checkpoint, of which the store may not have a file yet
        # All workers write into a local run folder. Into a remote one each writes by way of its own disk.
        self._expected_bytes = engine.checkpoint_bytes
        if self._run.is_remote:
            check_scratch(engine, self._scratch_folder, workers_of_node)
        else:
            self._expected_bytes = sum(gather_objects(engine.checkpoint_bytes))

    def save(self, engine: Engine, position: Position) -> None:
        """Save a checkpoint, and delete those that are too old. A collective.

        In an object store, the checkpoint is `pending` afterwards: workers upload their files while the training goes
        on, until `settle` or `finish`. A save waits for the upload before it.

        Raises:
            TrainingDiverged: a weight is not finite; earlier checkpoints are kept.
            SaveFailed: there is no room, or the store refuses; earlier checkpoints are kept.
        """
        self.finish()
        if not engine.has_finite_weights():
            raise TrainingDiverged(
                f"a weight is not finite after step {position.step:,}; the last checkpoint is kept\n  fix: {FIX}"
            )
        with self._one_message(position.step):
            mine = new_name(checkpoint_names(self._run)) if self._rank == 0 else None
        self._newest = gather_objects(mine)[0]
        with self._one_message(position.step), ExitStack() as until_published:
            scratch = until_published.enter_context(self._scratch())
            self._wait_for_room(scratch)
            with _full_disk_as_os_error(scratch):
                engine.save(scratch)
            if self._rank == 0:
                (scratch / POSITION_FILE).write_text(json.dumps(asdict(position)))
            manifest = write_manifest(scratch, position.step, self._rank, self._num_workers)
            if not self._run.is_remote:
                self._publish(scratch, self._newest, manifest)
            else:
                work = (position.step, scratch, self._newest, manifest, until_published.pop_all())
                self._task = self._thread.submit(self._upload, *work)
        if self._run.is_remote:
            self.pending, self._expected_bytes = position.step, manifest.num_bytes
            return
        self._expected_bytes = sum(gather_objects(manifest.num_bytes))  # waits until all have published
        self._prune(position.step)

    @property
    def is_uploading(self) -> bool:
        """Whether this worker's part of the pending checkpoint is not in the store yet. Any thread may ask."""
        task = self._task
        return self.pending is not None and task is not None and not (task.done() and task.exception() is None)

    def check(self) -> None:
        """Raise the error of an upload, if it has failed. Raises SaveFailed."""
        if self._task is not None and self._task.done():
            self._task.result()

    def settle(self) -> None:
        """Take the pending checkpoint for whole. All workers call this once no worker is uploading."""
        step, self.pending = self.pending, None
        if self._rank == 0 and step is not None:
            self._task = self._thread.submit(self._prune, step)

    def finish(self) -> None:
        """Wait until the pending checkpoint is whole. A collective. Raises SaveFailed."""
        if self._task is not None:
            self._task.result()
        if self.pending is None:
            return
        gather_objects(None)  # waits for the uploads of all
        step, self.pending = self.pending, None
        self._prune(step)

    def end_upload(self) -> None:
        """Wait for this worker's upload, which may be the last part of a checkpoint. Any thread may; raises nothing."""
        wait([self._task] if self._task is not None else [])

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
            self._publish(scratch, new_name([*checkpoint_names(self._run), self._newest]), manifest)
        return True

    def _upload(self, step: int, scratch: Path, name: str, manifest: Manifest, until_published: ExitStack) -> None:
        with self._one_message(step), until_published:
            self._publish(scratch, name, manifest)

    def _prune(self, step: int) -> None:
        if self._rank == 0:
            with self._one_message(step):
                prune(self._run, self._keep)

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
        for pause in (*ROOM_WAITS_S, None):
            free = shutil.disk_usage(scratch).free
            if free >= self._expected_bytes:
                return
            if pause is not None:
                time.sleep(pause)
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
