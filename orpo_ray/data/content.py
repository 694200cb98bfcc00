"""Digests of the content of data files, so that a resumed run notices other rows in a file of the same name and size.

A small dataset is read whole. Of each file of a larger one, some pieces are read, always the same ones: its start, its
end (where Parquet has the sizes of all its columns) and a few between. A change between two pieces goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs as pafs
import xxhash

from orpo_ray.data.shards import EASY_VQA, Shard
from orpo_ray.storage.files import is_remote, locate, read_bytes, with_retries

WHOLE_BYTES = 256 << 20
"""A local dataset of at most this size is read whole."""
WHOLE_REMOTE_BYTES = 16 << 20
PIECE_BYTES = 64 << 10
PIECES, REMOTE_PIECES = 16, 3
_THREADS = 16


def content_digests(shards: Sequence[Shard]) -> dict[str, str]:
    """Return path or URI -> size and digest of each file, in the order of the shards.

    Raises:
        OSError: a file cannot be read.
    """
    paths = list(dict.fromkeys(shard.path for shard in shards if not shard.path.startswith(EASY_VQA)))
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(zip(paths, pool.map(_size, paths), strict=True))
        total = {remote: sum(s for path, s in sizes.items() if is_remote(path) == remote) for remote in (False, True)}
        whole = {False: total[False] <= WHOLE_BYTES, True: total[True] <= WHOLE_REMOTE_BYTES}
        digests = pool.map(lambda path: _digest(path, sizes[path], whole[is_remote(path)]), paths)
        return {path: f"{sizes[path]} {digest}" for path, digest in zip(paths, digests, strict=True)}


def _size(path: str) -> int:
    filesystem, name = locate(path)
    info: pafs.FileInfo = with_retries(filesystem.get_file_info, name)
    return int(info.size or 0)


def _digest(path: str, size: int, is_whole: bool) -> str:
    digest = xxhash.xxh3_128()
    for offset, length in _pieces(size, REMOTE_PIECES if is_remote(path) else PIECES, is_whole):
        digest.update(read_bytes(path, offset, length))
    return digest.hexdigest()


def _pieces(size: int, count: int, is_whole: bool) -> list[tuple[int, int]]:
    """Return (offset, length) of what is read of a file."""
    if not is_whole and size > count * PIECE_BYTES:
        last = size - PIECE_BYTES
        return [(last * number // (count - 1), PIECE_BYTES) for number in range(count)]
    step = WHOLE_REMOTE_BYTES  # at a time
    return [(offset, min(step, size - offset)) for offset in range(0, size, step)]
