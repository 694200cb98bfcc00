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
from orpo_ray.storage.files import is_remote, list_files, locate, read_bytes, with_retries

# What stands in a run folder.
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
BAD_ROWS_FILE = "bad_rows.jsonl"
FINAL = "final"
BEST_RECIPE_FILE = "best_recipe.yaml"
TRIALS = "trials"
# The report that `data check` leaves there, and a plan reads.
DATA_CHECK = "data_check.json"
# The file that is written last, of a whole model's folder and of an adapters' folder: where it stands, all does.
LAST_OF_A_MODEL = ("config.json", "adapter_config.json")
# A model is fetched in pieces, each tried again by itself: as a whole it would begin anew at every lost connection.
PIECE_BYTES = 64 << 20


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
            for file, size in self._files(name) if self.is_remote else []:
                target = self.path / file
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as local:
                    for offset in range(0, size, PIECE_BYTES):
                        length = min(PIECE_BYTES, size - offset)
                        local.write(read_bytes(f"{self.uri}/{file}", offset, length))

    def push(self, *names: str) -> None:
        """Write files of this machine to the folder, over what is there."""
        for name in names:
            if self.is_remote and (self.path / name).exists():
                self._send(self.path / name, self._there(name))

    def place(self, scratch: Path, name: str) -> None:
        """Make a model's folder that was written at `scratch` the run's `name`: whole, or not there at all."""
        if not self.is_remote:
            shutil.rmtree(self.path / name, ignore_errors=True)
            scratch.rename(self.path / name)
            return
        if self.has(name):
            filesystem, _ = locate(self.uri, "checkpoint.storage")
            with_retries(filesystem.delete_dir, self._there(name))
        for file in sorted(scratch.iterdir(), key=lambda file: file.name in LAST_OF_A_MODEL):
            self._send(file, self._there(f"{name}/{file.name}"))
        shutil.rmtree(scratch)

    def _files(self, name: str) -> list[tuple[str, int]]:
        """A file, or every file in a folder, with its size."""
        filesystem, _ = locate(self.uri, "checkpoint.storage")
        above = self._there(name)
        found = [with_retries(filesystem.get_file_info, above)]
        if found[0].type == pafs.FileType.Directory:
            found = with_retries(filesystem.get_file_info, pafs.FileSelector(above, recursive=True))
        return [(name + info.path.removeprefix(above), info.size) for info in found if info.type == pafs.FileType.File]

    def _there(self, name: str) -> str:
        """The path of a file on the folder's filesystem."""
        return locate(f"{self.uri}/{name}", "checkpoint.storage")[1]

    def _kind(self, name: str) -> pafs.FileType:
        filesystem, _ = locate(self.uri, "checkpoint.storage")
        return with_retries(filesystem.get_file_info, self._there(name)).type

    def _send(self, local: Path, remote: str) -> None:
        filesystem, _ = locate(self.uri, "checkpoint.storage")
        with_retries(pafs.copy_files, str(local), remote, pafs.LocalFileSystem(), filesystem)
