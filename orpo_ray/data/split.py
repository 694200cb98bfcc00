"""Hold out a fraction of the training rows (`data.eval_fraction`), deterministically, without images on both sides.

Rows with a common image form a group, and so do text-only rows with the same prompt. Groups are held out as a whole.
They are selected by a hash of their own content, so that adding rows to a dataset changes the split little, and
copying the dataset to another folder or bucket does not change it. Images given by path are compared by path: two
files with the same content count as different images.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from orpo_ray.data.order import Order
from orpo_ray.data.other_images import image_fingerprint
from orpo_ray.data.pairs import Image, PreferencePair
from orpo_ray.data.reading import ReadSpec, read_pairs
from orpo_ray.errors import UserError

READER_THREADS = 4


def split_held_out(spec: ReadSpec, fraction: float) -> tuple[ReadSpec, ReadSpec]:
    """Split a dataset into training rows and held-out rows. Reads the dataset once.

    Args:
        spec: the rows to split.
        fraction: fraction of the rows to hold out; approximate, since groups stay together.

    Returns:
        The training rows, bad rows included so that training counts them, and the held-out rows.

    Raises:
        UserError: no such split exists.
    """
    if spec.order.num_rows == 0:
        raise UserError(
            "there are no rows to hold out",
            field="data.eval_fraction",
            value=fraction,
            fix="check data.train, or set data.eval_fraction to 0",
        )
    shards = range(len(spec.shards))
    with ThreadPoolExecutor(READER_THREADS) as pool:
        keys_by_shard = dict(zip(shards, pool.map(lambda shard: _read_keys(spec, shard), shards), strict=True))
    held_out = _select_held_out(keys_by_shard, fraction)
    train = {shard: np.setdiff1d(np.arange(spec.shards[shard].num_rows), held_out[shard]) for shard in shards}
    return _select_rows(spec, train, spec.order.weights), _select_rows(spec, held_out, (1.0,) * len(spec.order.weights))


def _select_rows(spec: ReadSpec, rows_by_shard: Mapping[int, np.ndarray], weights: tuple[float, ...]) -> ReadSpec:
    counts = tuple(len(rows_by_shard[shard]) for shard in range(len(spec.shards)))
    order: Order = replace(spec.order, shard_rows=counts, weights=weights)
    incomplete = {shard: rows for shard, rows in rows_by_shard.items() if len(rows) < spec.shards[shard].num_rows}
    return replace(spec, row_indices=incomplete, order=order, end_sample=order.num_rows)


def _read_keys(spec: ReadSpec, shard_index: int) -> list[tuple[str, ...]]:
    """Return the grouping keys of each row of a shard: its images, or its prompt; none for a bad row."""
    shard = spec.shards[shard_index]
    keys: list[tuple[str, ...]] = []
    # By all frames of videos, so that a run with another data.max_frames holds out the same rows.
    for pair in read_pairs(replace(spec, max_frames=sys.maxsize), shard_index, np.arange(shard.num_rows)):
        if not isinstance(pair, PreferencePair):
            keys.append(())
            continue
        images = [*pair.images, *(pair.rejected_images or ())]
        if images:
            keys.append(tuple(_image_key(image, spec.root_of(shard)) for image in images))
        else:
            keys.append((hashlib.sha256(json.dumps(pair.prompt).encode()).hexdigest(),))
    return keys


def _image_key(image: Image, root: str | None) -> str:
    """Name an image by its path in the dataset, or its bytes, and then by its whole path, to tell folders apart."""
    return f"{image_fingerprint(image, None)} {image_fingerprint(image, root)}"


def _place(key: str) -> bytes:
    """Hash the part of a key that does not depend on the folder of the dataset. Groups are selected in this order."""
    return hashlib.sha256(key.split(" ")[0].encode()).digest()


def _select_held_out(keys_by_shard: Mapping[int, list[tuple[str, ...]]], fraction: float) -> dict[int, np.ndarray]:
    """Return the held-out rows of each shard."""
    groups: dict[str, list[tuple[int, int]]] = defaultdict(list)
    find_group = _UnionFind(keys for rows in keys_by_shard.values() for keys in rows)
    total = 0
    for shard, rows in keys_by_shard.items():
        for row, keys in enumerate(rows):
            total += 1
            if keys:
                groups[find_group(keys[0])].append((shard, row))
    wanted = max(1, round(fraction * total))
    held_out: list[tuple[int, int]] = []
    for key in sorted(groups, key=lambda key: (_place(key), groups[key])):
        # Skip a group that would exceed the requested number by more than half.
        if len(held_out) + len(groups[key]) <= wanted + wanted // 2 and len(held_out) < wanted:
            held_out += groups[key]
    if not held_out or len(held_out) == total:
        reason = (
            "none of the rows can be used"
            if not groups
            else "an image would be on both sides, or no row would be left on one side"
        )
        raise UserError(
            f"cannot hold out this fraction of {total} rows: {reason}",
            field="data.eval_fraction",
            value=fraction,
            fix="give held-out pairs with data.eval, or set data.eval_fraction to 0",
        )
    rows_by_shard: dict[int, list[int]] = {shard: [] for shard in keys_by_shard}
    for shard, row in held_out:
        rows_by_shard[shard].append(row)
    return {shard: np.array(sorted(rows), np.int64) for shard, rows in rows_by_shard.items()}


class _UnionFind:
    """Groups keys that occur in the same row, directly or through other rows. The smallest key represents a group."""

    def __init__(self, rows: Iterable[tuple[str, ...]]) -> None:
        self._parents: dict[str, str] = {}
        for keys in rows:
            for key in keys:
                self._join(keys[0], key)

    def __call__(self, key: str) -> str:
        """Return the key that represents the group of `key`."""
        while (parent := self._parents.setdefault(key, key)) != key:
            self._parents[key] = self._parents[parent]
            key = parent
        return key

    def _join(self, one: str, other: str) -> None:
        first, second = sorted((self(one), self(other)))
        self._parents[second] = first
