"""The tiny families as parameters of tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from orpo_ray.tiny_models.families import TINY_FAMILIES


def with_processor(families: Iterable[str] = TINY_FAMILIES) -> list[Any]:
    """Families for a test that builds their processors: those that need torchvision are marked so."""
    marks = {True: [pytest.mark.torchvision], False: []}
    return [pytest.param(family, marks=marks[TINY_FAMILIES[family].needs_torchvision]) for family in sorted(families)]
