"""A run's folder on a disk or in an object store: written on this machine, then pushed where it belongs.

An object store cannot append and shows no half-written folder, so a remote run folder has a mirror here, one a process.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

import pyarrow.fs as pafs

from orpo_ray.errors import UserError
from orpo_ray.storage import is_remote, list_files, locate, patiently, read_bytes

# The file that is written last, of a whole model's folder and of an adapters' folder: where it stands, all does.
LAST_OF_A_MODEL = ("config.json", "adapter_config.json")


class RunFolder:
    """uri: where the folder is. path: where it is written on this machine; of a local run that is the folder itself."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.is_remote = is_remote(uri)
        if self.is_remote:
            self.path = Path(tempfile.mkdtemp(prefix="orpo-ray-"))
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        else:
            self.path = Path(uri)

    def make(self) -> None:
        """Make the folder if it is not there. Raises UserError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run's folder cannot be made: {error}", field="checkpoint.storage") from None

    def has(self, name: str) -> bool:
        """Whether a file or folder is there."""
        if not self.is_remote:
            return (self.path / name).exists()
        return self._kind(name) != pafs.FileType.NotFound

    def has_model(self, name: str) -> bool:
        """Whether a model's or an adapters' folder is there, whole."""
        return any(self.has(f"{name}/{last}") for last in LAST_OF_A_MODEL)

    def last_of(self, pattern: str) -> bytes | None:
        """What is in the last by name of the files that match a glob, if there are any."""
        if not self.is_remote:
            found = sorted(self.path.glob(pattern))
            return found[-1].read_bytes() if found else None
        uris = list_files(f"{self.uri}/{pattern}", "checkpoint.storage")
        return read_bytes(uris[-1]) if uris else None

    def pull(self, *names: str) -> None:
        """Bring files and folders, as far as they are there, to this machine."""
        for name in names:
            kind = self._kind(name) if self.is_remote else pafs.FileType.NotFound
            if kind != pafs.FileType.NotFound:
                target = self.path / name
                (target if kind == pafs.FileType.Directory else target.parent).mkdir(parents=True, exist_ok=True)
                self._copy(self._there(name), self.path / name, here=True)

    def push(self, *names: str) -> None:
        """Write files of this machine to the folder, over what is there."""
        for name in names:
            if self.is_remote and (self.path / name).exists():
                self._copy(self._there(name), self.path / name, here=False)

    def place(self, scratch: Path, name: str) -> None:
        """Make a model's folder that was written at `scratch` the run's `name`: whole, or not there at all."""
        if not self.is_remote:
            shutil.rmtree(self.path / name, ignore_errors=True)
            scratch.rename(self.path / name)
            return
        if self.has(name):
            filesystem, _ = locate(self.uri, "checkpoint.storage")
            patiently(filesystem.delete_dir, self._there(name))
        for file in sorted(scratch.iterdir(), key=lambda file: file.name in LAST_OF_A_MODEL):
            self._copy(self._there(f"{name}/{file.name}"), file, here=False)
        shutil.rmtree(scratch)

    def _there(self, name: str) -> str:
        """The path of a file on the folder's filesystem."""
        return locate(f"{self.uri}/{name}", "checkpoint.storage")[1]

    def _kind(self, name: str) -> pafs.FileType:
        filesystem, _ = locate(self.uri, "checkpoint.storage")
        return patiently(filesystem.get_file_info, self._there(name)).type

    def _copy(self, remote: str, local: Path, here: bool) -> None:
        there, _ = locate(self.uri, "checkpoint.storage")
        disk = pafs.LocalFileSystem()
        source, target = (remote, str(local)) if here else (str(local), remote)
        filesystems = (there, disk) if here else (disk, there)
        patiently(pafs.copy_files, source, target, *filesystems)
