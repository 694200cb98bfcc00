"""Count the bytes that the reading tasks of a run read, in whatever process they are."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from orpo_ray.data import shards
from orpo_ray.data.reading import ReadSpec
from orpo_ray.storage import files


@dataclass(frozen=True)
class CountedSpec(ReadSpec):
    """A `ReadSpec`. A process that receives one counts what it reads from files in `folder` from then on."""

    folder: str = ""

    def __reduce__(self) -> Any:
        return _received, (self.folder, {each.name: getattr(self, each.name) for each in fields(self)})


def counted(spec: ReadSpec, folder: Path) -> CountedSpec:
    """Return the same rows, whose bytes are counted where the files are in `folder`."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import the tests
    return CountedSpec(**{each.name: getattr(spec, each.name) for each in fields(ReadSpec)}, folder=str(folder))


def bytes_read(folder: Path) -> int:
    """Return how many bytes were read from files in the folder since the last call."""
    log = _log(str(folder))
    found = sum(map(int, log.read_text().split())) if log.exists() else 0
    log.unlink(missing_ok=True)
    return found


def _log(folder: str) -> Path:
    return Path(f"{folder}.bytes")


class _CountingFile(io.FileIO):
    def read(self, size: int | None = -1, /) -> Any:
        data = super().read(-1 if size is None else size)
        log = os.open(_log(os.path.dirname(str(self.name))), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, b"%d\n" % len(data))
        os.close(log)
        return data


class _CountingFilesystem:
    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(_CountingFile(path), mode="r")


def _received(folder: str, values: dict[str, Any]) -> CountedSpec:
    for module in (shards, files):
        own = vars(module)["locate"]

        def locate(path: str, *others: Any, own: Any = own, **named: Any) -> Any:
            is_counted = os.path.dirname(str(path)) == folder
            return (_CountingFilesystem(), path) if is_counted else own(path, *others, **named)

        vars(module)["locate"] = locate
    return CountedSpec(**values)
