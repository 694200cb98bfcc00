"""The manifest of a checkpoint: size and checksum of every file, by which a damaged checkpoint is recognized.

Every worker writes the manifest of its own files last. So a checkpoint is whole if the manifests of all workers are
there, and every file is as they say. No state is read to find out.
"""

from __future__ import annotations

import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from orpo_ray.storage.run_folder import RunFolder

_NAME = re.compile(r"manifest-\d{5}\.json")
_CHUNK_BYTES = 4 << 20
_FILES_AT_ONCE = 8  # a network disk or a store answers several readers faster than one


class Damage(Exception):
    """Why a checkpoint cannot be used."""


@dataclass(frozen=True)
class Manifest:
    """What one worker wrote."""

    step: int
    """Steps done."""
    rank: int
    num_workers: int
    """Workers that wrote the checkpoint."""
    files: dict[str, tuple[int, str]]
    """Path in the checkpoint -> size in bytes, and checksum."""

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(size for size, _ in self.files.values())

    def to_json(self) -> bytes:
        """Return the only text of these values, with a checksum of its own."""
        content = asdict(self)
        return _dump(content | {"checksum": xxhash.xxh3_128(_dump(content)).hexdigest()})

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Parse what `to_json` returned; one changed byte raises Damage."""
        try:
            content = json.loads(data)
            del content["checksum"]
            files = {name: (int(size), str(checksum)) for name, (size, checksum) in content.pop("files").items()}
            found = cls(**content, files=files)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise Damage("it is not a manifest") from None
        if found.to_json() != data:
            raise Damage("it was changed")
        return found


def manifest_name(rank: int) -> str:
    """Return the name of a worker's manifest."""
    return f"manifest-{rank:05}.json"


def write_manifest(folder: Path, step: int, rank: int, num_workers: int) -> Manifest:
    """Write the manifest of all files in a worker's folder. All files are on the disk afterwards. Raises OSError."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = xxhash.xxh3_128()
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
            files[path.relative_to(folder).as_posix()] = (file.tell(), digest.hexdigest())
    manifest = Manifest(step, rank, num_workers, files)
    with (folder / manifest_name(rank)).open("wb") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    return manifest


def check_sizes(run: RunFolder, checkpoint: str) -> list[Manifest]:
    """Check that a checkpoint is complete, without reading its state.

    Args:
        run: the run folder.
        checkpoint: name of the checkpoint's folder.

    Returns:
        The manifests of all workers.

    Raises:
        Damage: it is incomplete, or a file has another size.
        OSError: the store cannot be read now.
    """
    sizes = {path.removeprefix(f"{checkpoint}/"): size for path, size in run.list_sizes(checkpoint)}
    manifests = [_read_manifest(run, checkpoint, name) for name in sorted(filter(_NAME.fullmatch, sizes))]
    if not manifests:
        raise Damage("it has no manifest, so saving it did not end")
    first = manifests[0]
    if any((found.step, found.num_workers) != (first.step, first.num_workers) for found in manifests):
        raise Damage("its manifests are of different checkpoints")
    missing = set(range(first.num_workers)) - {found.rank for found in manifests}
    if missing:
        raise Damage(f"the manifest of worker {min(missing)} is missing, so saving it did not end")
    for manifest in manifests:
        for name, (size, _) in manifest.files.items():
            if name not in sizes:
                raise Damage(f"{name} is missing")
            if sizes[name] != size:
                raise Damage(f"{name} has {sizes[name]:,} bytes instead of {size:,}")
    return manifests


def check_content(run: RunFolder, checkpoint: str) -> list[Manifest]:
    """Check every byte of a checkpoint. Arguments, result and errors are those of `check_sizes`."""
    manifests = check_sizes(run, checkpoint)
    files = [(name, checksum) for manifest in manifests for name, (_, checksum) in manifest.files.items()]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        found = pool.map(lambda file: _checksum(run, checkpoint, file[0]), files)
        for (name, expected), checksum in zip(files, found, strict=True):
            if checksum != expected:
                pool.shutdown(wait=False, cancel_futures=True)
                raise Damage(f"{name} has another checksum than when it was written")
    return manifests


def read_checked(run: RunFolder, checkpoint: str, name: str) -> bytes:
    """Read one small file of a complete checkpoint, and check it. Errors are those of `check_sizes`."""
    files = {each: found for manifest in check_sizes(run, checkpoint) for each, found in manifest.files.items()}
    if name not in files:
        raise Damage(f"{name} is missing")
    data = b"".join(run.read_chunks(f"{checkpoint}/{name}", _CHUNK_BYTES))
    if xxhash.xxh3_128(data).hexdigest() != files[name][1]:
        raise Damage(f"{name} has another checksum than when it was written")
    return data


def _read_manifest(run: RunFolder, checkpoint: str, name: str) -> Manifest:
    try:
        manifest = Manifest.from_json(b"".join(run.read_chunks(f"{checkpoint}/{name}", _CHUNK_BYTES)))
    except Damage as damage:
        raise Damage(f"{name}: {damage}") from None
    if manifest_name(manifest.rank) != name:
        raise Damage(f"{name} is the manifest of worker {manifest.rank}")
    return manifest


def _checksum(run: RunFolder, checkpoint: str, name: str) -> str:
    digest = xxhash.xxh3_128()
    try:
        for chunk in run.read_chunks(f"{checkpoint}/{name}", _CHUNK_BYTES):
            digest.update(chunk)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno == errno.EIO:
            raise Damage(f"{name} cannot be read: {error}") from None
        raise
    return digest.hexdigest()


def _dump(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
