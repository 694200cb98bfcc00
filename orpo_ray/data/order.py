"""The order of pairs: arithmetic on sample indices, so a data position is one integer.

Legend: N rows in the set. A sample index counts rows through epoch 0, epoch 1, and so on: sample s is row s % N of
epoch s // N. Step k takes samples k*P to (k+1)*P - 1 over all workers; a step may span two epochs, so no tail is
dropped. A bad row leaves a gap at its sample index; later rows keep theirs.
"""

from __future__ import annotations

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
        shard_ranges = _shard_ranges(self, epoch)
        ends = np.cumsum([shard_range.num_rows for shard_range in shard_ranges])
        which = np.searchsorted(ends, positions, side="right")
        rows = np.empty((len(positions), 2), np.int64)
        for index in np.unique(which):
            shard_range, here = shard_ranges[index], which == index
            offsets = positions[here] - (ends[index] - shard_range.num_rows)
            rows[here] = np.stack(
                [np.full(len(offsets), shard_range.shard), self._rows_of(shard_range, offsets)], axis=1
            )
        return Window(epoch * self.num_rows + first, rows)

    def shard_ranges(self, epoch: int) -> list[ShardRange]:
        """Return the ranges of rows in an epoch, in the order in which windows take them."""
        found = [
            shard_range for source in range(len(self.weights)) for shard_range in self._source_ranges(source, epoch)
        ]
        if self.seed is None:
            return found
        return [found[index] for index in np.random.default_rng([self.seed, epoch]).permutation(len(found))]

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
def _shard_ranges(order: Order, epoch: int) -> list[ShardRange]:
    return order.shard_ranges(epoch)


def step_samples(step: int, pairs_per_step: int, total_samples: int) -> tuple[int, int]:
    """Return the sample indices [first, end) of a step. The last step of a run can be smaller."""
    first = step * pairs_per_step
    return min(first, total_samples), min(first + pairs_per_step, total_samples)


def total_samples(num_rows: int, epochs: float, pairs_per_step: int, max_steps: int | None) -> int:
    """Return the number of samples in a run."""
    samples = round(num_rows * epochs)
    return samples if max_steps is None else min(samples, max_steps * pairs_per_step)
