"""Few combinations by default, and all of them nightly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def cover(longer: Sequence[Any], *others: Sequence[Any]) -> list[Any]:
    """Return all combinations as parameters, most of which are nightly.

    By default, each value of the longest sequence, which comes first, has one value of each other sequence: so that
    every value is tried, a new one too. They rotate at different speeds, so as not to be always the same together.
    """
    assert all(len(other) <= len(longer) for other in others)
    some = [
        (one, *(other[number // (place + 1) % len(other)] for place, other in enumerate(others)))
        for number, one in enumerate(longer)
    ]
    for other, tried in zip(others, list(zip(*some, strict=True))[1:], strict=True):
        assert all(value in tried for value in other), "too few values of the first sequence to try all of another"
    return [pytest.param(*each, marks=[] if each in some else pytest.mark.nightly) for each in product(longer, *others)]
