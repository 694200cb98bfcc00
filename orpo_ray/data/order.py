"""The order of pairs, and which worker takes which: pure arithmetic on slots, so a position is one integer.

Legend: N rows in the set. A slot is a place in the endless sequence epoch 0, epoch 1, ...: slot s is place s % N of
epoch s // N. Step k takes slots k*P .. (k+1)*P - 1 over all workers, so it may straddle two epochs and no tail is
dropped. A bad row leaves its slot empty; nothing moves up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Window:
    """Rows of consecutive slots, shuffled among each other. rows: [n, 2] of (segment, row in the segment)."""

    first_slot: int
    rows: np.ndarray


@dataclass(frozen=True)
class Order:
    """The order of a set as a function of (seed, epoch), the same for any number of workers.

    Segments are shuffled among each other, then rows within windows, so that a reader holds one window at a time.
    seed None keeps the order of the files.
    """

    segment_rows: tuple[int, ...]
    seed: int | None
    window_rows: int

    @cached_property
    def num_rows(self) -> int:
        """N, the rows of one epoch."""
        return sum(self.segment_rows)

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
        sequence = np.arange(len(self.segment_rows))
        if self.seed is not None:
            sequence = np.random.default_rng([self.seed, epoch]).permutation(sequence)
            places = np.random.default_rng([self.seed, epoch, number]).permutation(places)
        ends = np.cumsum(np.asarray(self.segment_rows)[sequence])
        which = np.searchsorted(ends, places, side="right")
        rows = places - (ends[which] - np.asarray(self.segment_rows)[sequence[which]])
        return Window(epoch * self.num_rows + first, np.stack([sequence[which], rows], axis=1))

    def _window_of(self, slot: int) -> int:
        epoch, place = divmod(slot, self.num_rows)
        return epoch * self.windows_per_epoch + place // self.window_rows


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


def row_counts(segments: Sequence[object]) -> tuple[int, ...]:
    """`num_rows` of every segment, for `Order`."""
    return tuple(segment.num_rows for segment in segments)  # type: ignore[attr-defined]
