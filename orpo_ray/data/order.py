"""The order of pairs: arithmetic on sample indices, so a data position is one integer.

Legend: N rows in the set. A sample index counts rows through epoch 0, epoch 1, and so on: sample s is row s % N of
epoch s // N. Step k takes samples k*P to (k+1)*P - 1 over all workers; a step may span two epochs, so no tail is
dropped. A bad row leaves a gap at its sample index; later rows keep theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np


@dataclass(frozen=True)
class Window:
    """Rows of consecutive sample indices, shuffled within the window."""

    first_sample: int
    """Sample index of the first row."""
    rows: np.ndarray
    """(shard, row in the shard) of each row: int [n, 2]."""


@dataclass(frozen=True)
class ShardRange:
    """Rows [first_row, first_row + num_rows) of a shard."""

    shard: int
    first_row: int
    num_rows: int
    cycle: int
    """Number of complete passes through the source before this one."""


Visit = tuple[ShardRange, ...]
"""Ranges that are read together, since they are parts of one stored shard. Their rows alternate."""


@dataclass(frozen=True)
class Order:
    """The order of the rows of weighted sources, as a function of seed and epoch. It does not depend on the workers.

    An epoch takes `weight * rows` rows of each source. It continues where the last epoch ended, so that no row of a
    source repeats before all others were used. Shards are shuffled first, then rows within windows, so that a reader
    holds one window in memory.
    """

    shard_rows: tuple[int, ...]
    """Number of rows of each shard."""
    seed: int | None
    """Seed of the order; None keeps the order of the files."""
    window_rows: int
    """Number of rows per window."""
    shard_source: tuple[int, ...] = ()
    """Index of the source of each shard; empty if there is only one source."""
    weights: tuple[float, ...] = (1.0,)
    """Weight of each source."""
    stored_in: tuple[int, ...] = ()
    """Where shards are parts of stored ones (`data/weighting.py`): the number of the stored shard of each."""

    @cached_property
    def num_rows(self) -> int:
        """Number of rows per epoch, N."""
        return sum(self._source_rows(source)[1] for source in range(len(self.weights)))

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows per epoch."""
        return -(-self.num_rows // self.window_rows)

    def windows(self, first_sample: int, end_sample: int) -> list[tuple[int, int]]:
        """List (epoch, window) for every window with a sample in [first_sample, end_sample), in order."""
        if first_sample >= end_sample:
            return []
        first, last = self._window_of(first_sample), self._window_of(end_sample - 1)
        return [divmod(number, self.windows_per_epoch) for number in range(first, last + 1)]

    def window(self, epoch: int, number: int) -> Window:
        """Return the rows of a window, in the order of their sample indices."""
        first = number * self.window_rows
        positions = np.arange(first, min(first + self.window_rows, self.num_rows))
        if self.seed is not None:
            positions = np.random.default_rng([self.seed, epoch, number]).permutation(positions)
        visits = _visits(self, epoch)
        sizes = [sum(shard_range.num_rows for shard_range in visit) for visit in visits]
        ends = np.cumsum(sizes)
        which = np.searchsorted(ends, positions, side="right")
        rows = np.empty((len(positions), 2), np.int64)
        for index in np.unique(which):
            here = which == index
            rows[here] = self._rows_of_visit(visits[index], positions[here] - (ends[index] - sizes[index]))
        return Window(epoch * self.num_rows + first, rows)

    def visits(self, epoch: int) -> list[Visit]:
        """Return the ranges of rows in an epoch, in the order in which windows take them.

        The first ranges of all parts of a stored shard are read together, then their second ranges, and so on.
        """
        passes: Counter[int] = Counter()
        found: dict[tuple[int, int], list[ShardRange]] = {}
        for source in range(len(self.weights)):
            for shard_range in self._source_ranges(source, epoch):
                key = (self.stored_shard(shard_range.shard), passes[shard_range.shard])
                found.setdefault(key, []).append(shard_range)
                passes[shard_range.shard] += 1
        visits = [tuple(ranges) for ranges in found.values()]
        if self.seed is None:
            return visits
        return [visits[index] for index in np.random.default_rng([self.seed, epoch]).permutation(len(visits))]

    def stored_shard(self, shard: int) -> int:
        """Return the number of the stored shard that a shard is a part of, or its own."""
        return self.stored_in[shard] if self.stored_in else shard

    @property
    def stored_rows(self) -> np.ndarray:
        """Number of rows of each stored shard: int [shards]."""
        stored = np.array(self.stored_in or range(len(self.shard_rows)), np.int64)
        return np.bincount(stored, weights=np.array(self.shard_rows, np.int64)).astype(np.int64)

    def _source_rows(self, source: int) -> tuple[int, int]:
        """Return the rows of a source, and how many of them an epoch takes."""
        rows = sum(self.shard_rows[shard] for shard in self._shards(source))
        return rows, max(min(1, rows), round(rows * self.weights[source]))

    def _shards(self, source: int) -> list[int]:
        if not self.shard_source:
            return list(range(len(self.shard_rows)))
        return [shard for shard, owner in enumerate(self.shard_source) if owner == source]

    def _source_ranges(self, source: int, epoch: int) -> Iterator[ShardRange]:
        """Yield the ranges of a source in an epoch. Epochs take consecutive rows of an endlessly repeated source."""
        rows, taken = self._source_rows(source)
        shards = self._shards(source)
        if not rows:
            return
        cycle, skip = divmod(epoch * taken, rows)
        while taken > 0:
            sequence = np.arange(len(shards))
            if self.seed is not None:
                sequence = np.random.default_rng([self.seed, source, cycle]).permutation(sequence)
            for shard in (shards[index] for index in sequence):
                count = min(self.shard_rows[shard] - skip, taken)
                if count > 0:
                    yield ShardRange(shard, skip, count, cycle)
                    taken -= count
                skip = max(0, skip - self.shard_rows[shard])
            cycle += 1

    def _rows_of_visit(self, visit: Visit, offsets: np.ndarray) -> np.ndarray:
        """Return (shard, row in the shard) of the rows of a visit at these offsets: int [n, 2]."""
        if len(visit) == 1:
            (only,) = visit
            return np.stack([np.full(len(offsets), only.shard), self._rows_of(only, offsets)], axis=1)
        parts, offsets_in_parts = _alternate(tuple(shard_range.num_rows for shard_range in visit))
        rows = np.empty((len(offsets), 2), np.int64)
        for number, shard_range in enumerate(visit):
            here = parts[offsets] == number
            rows[here, 0] = shard_range.shard
            rows[here, 1] = self._rows_of(shard_range, offsets_in_parts[offsets[here]])
        return rows

    def _rows_of(self, shard_range: ShardRange, offsets: np.ndarray) -> np.ndarray:
        """Return the rows of a range at these offsets. An incomplete range has random rows, not the first ones."""
        size = self.shard_rows[shard_range.shard]
        if self.seed is None or shard_range.num_rows == size:
            return shard_range.first_row + offsets
        shuffled = np.random.default_rng([self.seed, shard_range.shard, shard_range.cycle, size]).permutation(size)
        return shuffled[shard_range.first_row + offsets]

    def _window_of(self, sample_index: int) -> int:
        epoch, position = divmod(sample_index, self.num_rows)
        return epoch * self.windows_per_epoch + position // self.window_rows


@lru_cache(maxsize=4)
def _visits(order: Order, epoch: int) -> list[Visit]:
    return order.visits(epoch)


@lru_cache(maxsize=4)
def _alternate(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Let the rows of several parts alternate, so that every stretch holds each part in its proportion.

    Returns:
        The part of each row and its offset in the part: two int arrays [sum of counts].
    """
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    parts = np.repeat(np.arange(len(counts)), counts)
    offsets = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort(places, kind="stable")
    return parts[order], offsets[order]


def step_samples(step: int, pairs_per_step: int, total_samples: int) -> tuple[int, int]:
    """Return the sample indices [first, end) of a step. The last step of a run can be smaller."""
    first = step * pairs_per_step
    return min(first, total_samples), min(first + pairs_per_step, total_samples)


def total_samples(num_rows: int, epochs: float, pairs_per_step: int, max_steps: int | None) -> int:
    """Return the number of samples in a run."""
    samples = round(num_rows * epochs)
    return samples if max_steps is None else min(samples, max_steps * pairs_per_step)
