"""Refuse to resume a run on other data than it began with, and name the files that changed."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from orpo_ray.data.content import content_digests
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import UserError, some_of
from orpo_ray.storage.run_folder import DATA_FILE, RunFolder


def check_data(read: ReadSpec, folder: RunFolder, is_new: bool) -> None:
    """Compare the files of the training data with those that the run began with; keep those of a new run.

    A file may have moved to another folder.

    Args:
        read: the rows of the run.
        folder: of the run.
        is_new: whether the run has made no step yet.

    Raises:
        UserError: a file is missing, was added, has another content, or cannot be read.
    """
    try:
        digests = content_digests(read.shards)
    except OSError as error:
        raise UserError(
            f"cannot read the training data: {error}", field="data.train", fix="check the files and your access to them"
        ) from None
    files = [[PurePosixPath(path).name, digest] for path, digest in digests.items()]
    before = None if is_new else _read(folder)
    if before is None:
        (folder.path / DATA_FILE).write_text(json.dumps(files), encoding="utf-8")
        folder.push(DATA_FILE)
        return
    if before == files:
        return
    old, new = ({tuple(file) for file in each} for each in (before, files))
    names = sorted({name for name, _ in old ^ new})
    what = f"these files of the training data have changed since the run began: {some_of(names)}"
    raise UserError(
        what if names else "the files of the training data are in another order than when the run began",
        field="data.train",
        fix="resume with the same files, or start a new run under another name (name=...)",
    )


def _read(folder: RunFolder) -> list[list[str]] | None:
    """Return the files that the run began with; None if an earlier version began it, or the list is damaged."""
    folder.pull(DATA_FILE)
    path = folder.path / DATA_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:
        return None
    return found if isinstance(found, list) else None
