"""How long a device is idle, from the times of what ran on it."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]
"""Begin and end."""


def idle_fraction(intervals: Iterable[Interval]) -> float:
    """Return the fraction of the time from the first begin to the last end that lies in none of the intervals."""
    ordered = sorted(intervals)
    begin, idle = ordered[0][0], 0.0
    end = begin
    for start, stop in ordered:
        idle += max(0.0, start - end)
        end = max(end, stop)
    return idle / (end - begin)
