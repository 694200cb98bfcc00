"""The order of pairs, and which worker takes which: pure arithmetic on slots, so a position is one integer.

Legend: N rows in the set. A slot is a place in the endless sequence epoch 0, epoch 1, ...: slot s is place s % N of
epoch s // N. Step k takes slots k*P .. (k+1)*P - 1 over all workers, so it may straddle two epochs and no tail is
dropped. A bad row leaves its slot empty; nothing moves up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np


@dataclass(frozen=True)
class Window:
    """Rows of consecutive slots, shuffled among each other. rows: [n, 2] of (segment, row in the segment)."""

    first_slot: int
    rows: np.ndarray


@dataclass(frozen=True)
class Piece:
    """Rows [first_row, first_row + num_rows) of a segment, in the `cycle`-th time that its source is gone through."""

    segment: int
    first_row: int
    num_rows: int
    cycle: int


@dataclass(frozen=True)
class Order:
    """The order of a mix of sources as a function of (seed, epoch), the same for any number of workers.

    An epoch takes `weight * rows` rows of every source: a source goes on where the last epoch left it, so that no row
    comes up a second time before all of that source did. Segments are shuffled among each other, then rows within
    windows, so that a reader holds one window at a time. seed None keeps the order of the files.

    segment_rows: the rows of every segment. segment_source: the source of every segment; by default all are of one.
    weights: of every source.
    """

    segment_rows: tuple[int, ...]
    seed: int | None
    window_rows: int
    segment_source: tuple[int, ...] = ()
    weights: tuple[float, ...] = (1.0,)

    @cached_property
    def num_rows(self) -> int:
        """N, the rows of one epoch."""
        return sum(self._source_rows(source)[1] for source in range(len(self.weights)))

    @property
    def windows_per_epoch(self) -> int:
        """How many windows an epoch is cut into."""
        return -(-self.num_rows // self.window_rows)

    def windows(self, first_slot: int, last_slot: int) -> list[tuple[int, int]]:
        """(epoch, window) of every window that holds a slot of [first_slot, last_slot), in order of slots."""
        if first_slot >= last_slot:
            return []
        first, last = self._window_of(first_slot), self._window_of(last_slot - 1)
        return [divmod(number, self.windows_per_epoch) for number in range(first, last + 1)]

    def window(self, epoch: int, number: int) -> Window:
        """The rows of one window, in the order of their slots."""
        first = number * self.window_rows
        places = np.arange(first, min(first + self.window_rows, self.num_rows))
        if self.seed is not None:
            places = np.random.default_rng([self.seed, epoch, number]).permutation(places)
        pieces = _pieces(self, epoch)
        ends = np.cumsum([piece.num_rows for piece in pieces])
        which = np.searchsorted(ends, places, side="right")
        rows = np.empty((len(places), 2), np.int64)
        for index in np.unique(which):
            piece, here = pieces[index], which == index
            offsets = places[here] - (ends[index] - piece.num_rows)
            rows[here] = np.stack([np.full(len(offsets), piece.segment), self._rows_of(piece, offsets)], axis=1)
        return Window(epoch * self.num_rows + first, rows)

    def pieces(self, epoch: int) -> list[Piece]:
        """The runs of rows that an epoch is made of, in the order that windows take them."""
        found = [piece for source in range(len(self.weights)) for piece in self._source_pieces(source, epoch)]
        if self.seed is None:
            return found
        return [found[index] for index in np.random.default_rng([self.seed, epoch]).permutation(len(found))]

    def _source_rows(self, source: int) -> tuple[int, int]:
        """Rows that a source has, and how many of them an epoch takes."""
        rows = sum(self.segment_rows[segment] for segment in self._segments(source))
        return rows, max(min(1, rows), round(rows * self.weights[source]))

    def _segments(self, source: int) -> list[int]:
        if not self.segment_source:
            return list(range(len(self.segment_rows)))
        return [segment for segment, owner in enumerate(self.segment_source) if owner == source]

    def _source_pieces(self, source: int, epoch: int) -> Iterator[Piece]:
        """A source is an endless sequence of cycles through all its rows; an epoch takes the next run of it."""
        rows, taken = self._source_rows(source)
        segments = self._segments(source)
        if not rows:
            return
        cycle, skip = divmod(epoch * taken, rows)
        while taken > 0:
            sequence = np.arange(len(segments))
            if self.seed is not None:
                sequence = np.random.default_rng([self.seed, source, cycle]).permutation(sequence)
            for segment in (segments[place] for place in sequence):
                count = min(self.segment_rows[segment] - skip, taken)
                if count > 0:
                    yield Piece(segment, skip, count, cycle)
                    taken -= count
                skip = max(0, skip - self.segment_rows[segment])
            cycle += 1

    def _rows_of(self, piece: Piece, offsets: np.ndarray) -> np.ndarray:
        """The rows of a piece at these offsets. A part of a segment is a random part, not its beginning."""
        size = self.segment_rows[piece.segment]
        if self.seed is None or piece.num_rows == size:
            return piece.first_row + offsets
        shuffled = np.random.default_rng([self.seed, piece.segment, piece.cycle, size]).permutation(size)
        return shuffled[piece.first_row + offsets]

    def _window_of(self, slot: int) -> int:
        epoch, place = divmod(slot, self.num_rows)
        return epoch * self.windows_per_epoch + place // self.window_rows


@lru_cache(maxsize=4)
def _pieces(order: Order, epoch: int) -> list[Piece]:
    return order.pieces(epoch)


def owner(slots: np.ndarray, pairs_per_step: int, num_workers: int) -> np.ndarray:
    """The worker of each slot: a step's slots are cut into contiguous shares that differ by at most one."""
    return (slots % pairs_per_step) * num_workers // pairs_per_step


def step_slots(step: int, pairs_per_step: int, total_slots: int) -> tuple[int, int]:
    """Slots [first, last) of a step; the very last step may be smaller."""
    first = step * pairs_per_step
    return min(first, total_slots), min(first + pairs_per_step, total_slots)


def total_slots(num_rows: int, epochs: float, pairs_per_step: int, max_steps: int | None) -> int:
    """Slots of a whole run."""
    slots = round(num_rows * epochs)
    return slots if max_steps is None else min(slots, max_steps * pairs_per_step)
