"""Twenty thousand corrupt image files."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from support.broken_images import broken_files, outcome, quickly

# Pillow warns about corrupt files.
pytestmark = pytest.mark.filterwarnings("ignore")


@settings(quickly, max_examples=20_000)
@given(broken_files())
def test_many_broken_files(data: bytes) -> None:
    outcome(data)
