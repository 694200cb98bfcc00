"""Marks and ticks of an axis."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """A labeled position on an axis."""

    at: float
    label: str
    kind: str = ""


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Return about `count` round values from low to high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.999 * rough)
    step = max(1.0, step) if whole else step
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
