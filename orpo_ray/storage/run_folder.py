"""The folder of a run, on a disk or in an object store.

Object stores cannot append to a file, so each process keeps a local mirror of a remote run folder, writes there, and
uploads files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from orpo_ray.errors import UserError
from orpo_ray.storage.files import is_remote, locate, read_bytes, with_retries
from orpo_ray.storage.scratch import make_scratch

# Names in a run folder.
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
BAD_ROWS_FILE = "bad_rows.jsonl"
DATA_FILE = "data.json"  # the data files that the run began with, and digests of their content
ENVIRONMENT_FILE = "environment.json"  # versions and hardware that the run began with
REPORT_FILE = "report.html"
FINAL = "final"
EVAL_PAIRS_FILE = "eval_pairs.parquet"  # scores of each held-out pair by the final model
EVAL_PAIRS_START_FILE = "eval_pairs_start.parquet"  # the same by the model before the first step
EVAL_TOKENS_FILE = "eval_tokens.json"  # log-probs of single tokens, for the pairs that the report shows
GENERATIONS_FILE = "generations.jsonl"  # the model's own answers to some held-out pairs
BEST_RECIPE_FILE = "best_recipe.yaml"
TRIALS = "trials"
# Of a sweep.
SWEEP_FILE = "sweep.json"  # what every trial was given and reached, from which an interrupted sweep goes on
SWEEP_PAGE = "sweep.html"
TRIALS_TABLE = "trials.csv"
OPTUNA_FILE = "optuna.journal"
# Of `orpo-ray iterate`: what each round made and reached.
ROUNDS_FILE = "rounds.json"
# Report of `orpo-ray data check`, which `orpo-ray plan` reads.
DATA_CHECK_FILE = "data_check.json"
# Of a model folder and of an adapter folder, the file that is written last: if it exists, the folder is complete.
COMPLETION_FILES = ("config.json", "adapter_config.json")
# Large files are downloaded in chunks, so that a lost connection repeats one chunk and not the whole file.
DOWNLOAD_CHUNK_BYTES = 64 << 20


class RunFolder:
    """A run folder.

    Attributes:
        uri: path or URI of the folder.
        path: local folder to write to: the run folder itself, or the mirror of a remote one.
        is_remote: whether the run folder is in an object store.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.is_remote = is_remote(uri)
        if self.is_remote:
            self.path = make_scratch()
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        else:
            self.path = Path(uri)

    def make(self) -> None:
        """Create the folder if it does not exist. Raises UserError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create the run folder: {error}",
                field="checkpoint.storage",
                value=self.uri,
                fix="set checkpoint.storage to a folder you can write to",
            ) from None

    def drop_if_empty(self) -> None:
        """Delete a local folder that nothing was written to; an object store has no empty folders."""
        if not self.is_remote:
            with contextlib.suppress(OSError):  # it is not empty
                self.path.rmdir()

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name exists in the run folder."""
        if not self.is_remote:
            return os.path.exists(self.path / name)  # False also for a name that is too long
        return self._file_type(name) != pafs.FileType.NotFound

    def has_model(self, name: str) -> bool:
        """Whether the run folder contains a complete model or adapter folder of this name."""
        return any(self.has(f"{name}/{file}") for file in COMPLETION_FILES)

    def pull(self, *names: str) -> None:
        """Download files and folders into the local mirror. Names that do not exist are skipped."""
        for name in names:
            for file, size in self.list_sizes(name) if self.is_remote else []:
                target = self.path / file
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as local:
                    for offset in range(0, size, DOWNLOAD_CHUNK_BYTES):
                        length = min(DOWNLOAD_CHUNK_BYTES, size - offset)
                        local.write(read_bytes(f"{self.uri}/{file}", offset, length))

    def push(self, *names: str) -> None:
        """Upload files from the local mirror, replacing existing ones."""
        for name in names:
            if self.is_remote and (self.path / name).exists():
                self._upload(self.path / name, self._path_in_store(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a file: readers see it whole, or what was there before. Raises OSError."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        scratch.write_bytes(data)
        scratch.replace(path)
        self.push(name)

    def list_folders(self) -> list[str]:
        """Return the names of the folders in the run folder."""
        filesystem, root = locate(self.uri, "checkpoint.storage")
        found = with_retries(filesystem.get_file_info, pafs.FileSelector(root, allow_not_found=True))
        return [info.base_name for info in found if info.type == pafs.FileType.Directory]

    def list_sizes(self, name: str) -> list[tuple[str, int]]:
        """Return (name, bytes) of a file, or of all files in a folder; an empty list if it does not exist."""
        filesystem, _ = locate(self.uri, "checkpoint.storage")
        root = self._path_in_store(name)
        found = [with_retries(filesystem.get_file_info, root)]
        if found[0].type == pafs.FileType.Directory:
            found = with_retries(filesystem.get_file_info, pafs.FileSelector(root, recursive=True))
        return [(name + info.path.removeprefix(root), info.size) for info in found if info.type == pafs.FileType.File]

    def read_chunks(self, name: str, chunk_bytes: int) -> Iterator[bytes]:
        """Yield the bytes of a file in order. Raises OSError."""
        if not self.is_remote:
            with (self.path / name).open("rb") as file:
                while chunk := file.read(chunk_bytes):
                    yield chunk
            return
        for path, size in self.list_sizes(name):
            for offset in range(0, size, DOWNLOAD_CHUNK_BYTES):
                yield read_bytes(f"{self.uri}/{path}", offset, min(DOWNLOAD_CHUNK_BYTES, size - offset))

    def upload(self, local: Path, name: str) -> None:
        """Upload a file to a remote run folder, under any name. Raises OSError."""
        self._upload(local, self._path_in_store(name))

    def delete(self, name: str) -> None:
        """Delete a file or a folder, if it exists. Raises OSError."""
        filesystem, _ = locate(self.uri, "checkpoint.storage")
        path = self._path_in_store(name)
        kind = with_retries(filesystem.get_file_info, path).type
        if kind == pafs.FileType.Directory:
            with_retries(filesystem.delete_dir, path)
        elif kind == pafs.FileType.File:
            with_retries(filesystem.delete_file, path)

    def move_model(self, scratch: Path, name: str) -> None:
        """Move a model folder from `scratch` into the run folder as `name`, replacing an existing one.

        Readers that check `has_model` see the complete folder or none.
        """
        if not self.is_remote:
            shutil.rmtree(self.path / name, ignore_errors=True)
            scratch.rename(self.path / name)
            return
        self.delete(name)
        for file in sorted(scratch.iterdir(), key=lambda file: file.name in COMPLETION_FILES):
            self._upload(file, self._path_in_store(f"{name}/{file.name}"))
        shutil.rmtree(scratch)

    def _path_in_store(self, name: str) -> str:
        """Return the path of a file on the run folder's filesystem."""
        return locate(f"{self.uri}/{name}", "checkpoint.storage")[1]

    def _file_type(self, name: str) -> pafs.FileType:
        filesystem, _ = locate(self.uri, "checkpoint.storage")
        return with_retries(filesystem.get_file_info, self._path_in_store(name)).type

    def _upload(self, local: Path, remote: str) -> None:
        filesystem, _ = locate(self.uri, "checkpoint.storage")
        with_retries(pafs.copy_files, str(local), remote, pafs.LocalFileSystem(), filesystem)


def not_a_run(folder: RunFolder, fix: str = "give the folder of a run", or_model: str = "") -> UserError:
    """Return the error for a folder without a recipe, for a file, and for what does not exist.

    Args:
        folder: where no run is.
        fix: what to do.
        or_model: the files that would make the folder a model, where a model is as good as a run.
    """
    if not folder.is_remote and os.path.isfile(folder.uri):
        problem = "this is a file, not a folder"
    elif not folder.is_remote and not os.path.isdir(folder.uri):
        problem = "no such folder"
    elif or_model:
        problem = f"the folder is neither a run (no {RECIPE_FILE}) nor a model (no {or_model})"
    else:
        problem = f"the folder is no run (no {RECIPE_FILE})"
    return UserError(problem, field=folder.uri, fix=fix)
