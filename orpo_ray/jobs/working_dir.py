"""What of a working directory Ray would upload, by Ray's own rules, and whether that is within Ray's limit."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

from orpo_ray.errors import UserError

MIB = 2**20
NAMED = 5  # of the largest files and folders in a message
_QUIET = logging.getLogger("orpo_ray.jobs.working_dir.quiet")
_QUIET.setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Upload:
    """The files that Ray would upload."""

    sizes: dict[str, int]
    """Path in the working directory -> bytes."""

    @property
    def total(self) -> int:
        """Bytes of all files. Ray packs them without compression."""
        return sum(self.sizes.values())

    def largest(self) -> str:
        """Name the largest files and top-level folders, with their sizes."""
        by_entry: dict[str, int] = {}
        for path, size in self.sizes.items():
            first, _, rest = path.partition("/")
            entry = f"{first}/" if rest else first
            by_entry[entry] = by_entry.get(entry, 0) + size
        largest = sorted(by_entry.items(), key=lambda item: -item[1])[:NAMED]
        return ", ".join(f"{name} {size / MIB:,.0f} MiB" for name, size in largest)


def check_folder(folder: Path) -> None:
    """Check that the working directory is a folder. Raises UserError."""
    if not folder.is_dir():
        raise UserError("no such folder", field="--working-dir", value=str(folder), fix="give the folder to upload")


def list_upload(folder: Path, excludes: Sequence[str]) -> Upload:
    """List the files that Ray would upload from a working directory.

    Args:
        folder: the working directory.
        excludes: patterns of `excludes` in the runtime environment. Those of .gitignore and .rayignore, and Ray's
            own, are added.

    Raises:
        UserError: a file cannot be read.
    """
    sizes: dict[str, int] = {}
    root = folder.absolute()

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size

    with_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    patterns = [*get_runtime_env_default_excludes(), *excludes]
    try:
        _dir_travel(root, [_get_excludes(root, patterns)], add, with_gitignore, _QUIET)
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}",
            field="--working-dir",
            value=error.filename,
            fix="exclude it in .rayignore",
        ) from None
    return Upload(sizes)


def check_size(upload: Upload, folder: Path) -> None:
    """Check that Ray takes a package of this size. Raises UserError."""
    if upload.total >= GCS_STORAGE_MAX_SIZE:
        raise UserError(
            f"holds {upload.total / MIB:,.0f} MiB in {len(upload.sizes):,} files, and Ray takes less than "
            f"{GCS_STORAGE_MAX_SIZE / MIB:,.0f} MiB; the largest: {upload.largest()}",
            field="--working-dir",
            value=str(folder),
            fix="name what a job does not need in .rayignore (as in .gitignore), or keep data in a shared folder or an "
            "object store",
        )
