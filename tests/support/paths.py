"""Paths in the repository, and of optional data next to it."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
# Real data and processors next to the checkout. Tests that need them are skipped, with a reason, if they are absent.
SHARED = ROOT.parent / "shared"
