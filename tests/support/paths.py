"""Where the repository's files lie, and data that may lie beside a checkout."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
# Real data and processors that may lie beside a checkout; tests that want them say so where they are absent.
SHARED = ROOT.parent / "shared"
