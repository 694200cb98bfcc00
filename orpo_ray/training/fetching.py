"""Fetch from an object store those files of a checkpoint that the workers of a node read, each once, and check them."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch.distributed as dist
import xxhash

from orpo_ray.objective.collectives import gather_objects
from orpo_ray.storage.files import read_bytes
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.storage.scratch import make_scratch
from orpo_ray.training.manifest import check_sizes

CHUNK_BYTES = 32 << 20
CHUNKS_AT_ONCE = 8  # of a file; so a worker holds this many in memory

Files = Mapping[str, tuple[int, str]]
"""Path in the checkpoint -> size in bytes, and checksum."""


@contextmanager
def fetched(
    run: RunFolder, name: str, wanted: Callable[[Collection[str], int], Collection[str]], node: str, scratch: str | None
) -> Iterator[Path]:
    """Yield a folder with the files of a checkpoint that the workers of this node read. A collective.

    In a local run folder, it is the checkpoint itself. Otherwise, it is a folder on the node's disk: each worker of the
    node downloads a part of its files and compares them with their checksums. It is removed once all workers are done.

    Args:
        run: the run folder.
        name: of the checkpoint, which is complete.
        wanted: all files, and the number of workers that wrote them -> those that this worker reads.
        node: identifies this worker's node.
        scratch: the recipe's `checkpoint.scratch`.

    Raises:
        OSError: the store or the disk fails, or a file has another checksum than when it was written.
    """
    if not run.is_remote:
        yield run.path / name
        return
    rank = dist.get_rank() if dist.is_initialized() else 0
    manifests = check_sizes(run, name) if rank == 0 else []  # one worker asks the store for all
    files: Files = gather_objects({file: facts for each in manifests for file, facts in each.files.items()})[0]
    writers: int = gather_objects(len(manifests))[0]
    plans = gather_objects((node, set(wanted(files, writers))))
    here = [other for other, (its_node, _) in enumerate(plans) if its_node == node]
    own = make_scratch(scratch) if rank == here[0] else None
    try:
        folder = Path(gather_objects(str(own))[here[0]])
        needed = set().union(*(plans[other][1] for other in here))
        for file in _divided({file: files[file] for file in needed}, len(here))[here.index(rank)]:
            _download(run, f"{name}/{file}", folder / file, *files[file])
        gather_objects(None)  # the other workers of the node have their parts
        yield folder
        gather_objects(None)  # no worker reads any longer
    finally:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)


def _divided(files: Files, workers: int) -> list[list[str]]:
    """Divide files among workers, so that each has about as many bytes."""
    parts: list[list[str]] = [[] for _ in range(workers)]
    sizes = [0] * workers
    for file, (size, _) in sorted(files.items(), key=lambda each: (-each[1][0], each[0])):
        least = sizes.index(min(sizes))
        parts[least].append(file)
        sizes[least] += size
    return parts


def _download(run: RunFolder, file: str, target: Path, size: int, checksum: str) -> None:
    def read(offset: int) -> bytes:
        return read_bytes(f"{run.uri}/{file}", offset, min(CHUNK_BYTES, size - offset))

    target.parent.mkdir(parents=True, exist_ok=True)
    digest, offsets = xxhash.xxh3_128(), iter(range(0, size, CHUNK_BYTES))
    with ThreadPoolExecutor(CHUNKS_AT_ONCE) as pool, target.open("wb") as copy:
        chunks = deque(pool.submit(read, offset) for offset in islice(offsets, CHUNKS_AT_ONCE))
        while chunks:
            data = chunks.popleft().result()
            chunks.extend(pool.submit(read, offset) for offset in islice(offsets, 1))
            digest.update(data)
            copy.write(data)
    if digest.hexdigest() != checksum:
        raise OSError(f"{run.uri}/{file} has another checksum than when it was written")


def all_files(files: Collection[str], num_writers: int) -> Sequence[str]:
    """What a worker reads whose engine does not say more."""
    return list(files)
