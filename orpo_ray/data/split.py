"""A held-out share of a training set, where no held-out set is given: always the same rows, no image on both sides.

Rows that show one image belong together; so do text-only rows with one prompt. Whole groups are held out, chosen by
their own hash, so that rows added to a set later change little of the split. The same photograph in two files is seen
as the same only where the files' bytes stand in the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from orpo_ray.data.order import Order
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, image_fingerprint, read_pairs
from orpo_ray.errors import UserError

READERS = 4


def split_off(spec: ReadSpec, share: float) -> tuple[ReadSpec, ReadSpec]:
    """What is trained on, and what is held out: about `share` of the rows. Reads the whole set once.

    A bad row stays in training, where it is counted. Raises UserError where nothing can be held out.
    """
    if spec.order.num_rows == 0:
        raise UserError("there are no rows to hold out", field="data.eval_fraction", value=share)
    with ThreadPoolExecutor(READERS) as pool:
        numbers = range(len(spec.shards))
        by_segment = dict(zip(numbers, pool.map(lambda number: _keys(spec, number), numbers), strict=True))
    held = _held_out(by_segment, share)
    everything = {number: np.arange(spec.shards[number].num_rows) for number in numbers}
    train = {number: np.setdiff1d(rows, held[number]) for number, rows in everything.items()}
    return _part(spec, train, spec.order.weights), _part(spec, held, (1.0,) * len(spec.order.weights))


def _part(spec: ReadSpec, kept: Mapping[int, np.ndarray], weights: tuple[float, ...]) -> ReadSpec:
    counts = tuple(len(kept[number]) for number in range(len(spec.shards)))
    order: Order = replace(spec.order, shard_rows=counts, weights=weights)
    partly = {number: rows for number, rows in kept.items() if len(rows) < spec.shards[number].num_rows}
    return replace(spec, row_indices=partly, order=order, end_sample=order.num_rows)


def _keys(spec: ReadSpec, number: int) -> list[tuple[str, ...]]:
    """What each row of a shard shares with others: its images, or its prompt; nothing for a bad row."""
    shard = spec.shards[number]
    keys: list[tuple[str, ...]] = []
    for pair in read_pairs(spec, number, np.arange(shard.num_rows)):
        if not isinstance(pair, PreferencePair):
            keys.append(())
            continue
        images = [*pair.images, *(pair.rejected_images or ())]
        if images:
            keys.append(tuple(image_fingerprint(image, spec.root_of(shard)) for image in images))
        else:
            keys.append((hashlib.sha256(json.dumps(pair.prompt).encode()).hexdigest(),))
    return keys


def _held_out(by_segment: Mapping[int, list[tuple[str, ...]]], share: float) -> dict[int, np.ndarray]:
    """The rows of every shard that are held out."""
    groups: dict[str, list[tuple[int, int]]] = defaultdict(list)
    find = _Together(keys for rows in by_segment.values() for keys in rows)
    total = 0
    for number, rows in by_segment.items():
        for row, keys in enumerate(rows):
            total += 1
            if keys:
                groups[find(keys[0])].append((number, row))
    wanted = max(1, round(share * total))
    held: list[tuple[int, int]] = []
    for key in sorted(groups, key=lambda key: hashlib.sha256(key.encode()).digest()):
        # A group that is larger than what is left to take would hold out much more than was asked for.
        if len(held) + len(groups[key]) <= wanted + wanted // 2 and len(held) < wanted:
            held += groups[key]
    if not held or len(held) == total:
        why = (
            "none of the rows can be used" if not groups else "there would be an image on both sides, or nothing on one"
        )
        raise UserError(
            f"of the {total} rows no such share can be held out: {why}",
            field="data.eval_fraction",
            value=share,
            fix="give held-out pairs with data.eval, or set it to 0",
        )
    out: dict[int, list[int]] = {number: [] for number in by_segment}
    for number, row in held:
        out[number].append(row)
    return {number: np.array(sorted(rows), np.int64) for number, rows in out.items()}


class _Together:
    """Union-find over keys: those that ever stood in one row have one representative, the least of them."""

    def __init__(self, rows: Iterable[tuple[str, ...]]) -> None:
        self._parents: dict[str, str] = {}
        for keys in rows:
            for key in keys:
                self._join(keys[0], key)

    def __call__(self, key: str) -> str:
        """The representative."""
        while (up := self._parents.setdefault(key, key)) != key:
            self._parents[key] = self._parents[up]
            key = up
        return key

    def _join(self, one: str, other: str) -> None:
        first, second = sorted((self(one), self(other)))
        self._parents[second] = first
