"""Benchmarks can be started: each one's imports exist in the package as it is. Some of what they count is checked."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_it_is_importable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(path, monkeypatch).__doc__


def test_what_a_start_and_an_end_call_does_not_count_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers: 8 more steps have 16 more shares and 8 more lines of status."""
    benchmark = load(ROOT / "benchmarks" / "control_calls.py", monkeypatch)
    short = Counter({"StepFeed.take": 4, "RunStatus.update": 9, "RunStatus.state": 30})
    long = Counter({"StepFeed.take": 20, "RunStatus.update": 17, "RunStatus.state": 50})
    assert benchmark.per_step(short, long, 8) == {"share of a step": 2.0, "status, by rank 0": 1.0}


def test_the_reading_rate_is_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load(ROOT / "benchmarks" / "reading_rate.py", monkeypatch)
    found = benchmark.measure(150, 1000, 1)
    assert (found["rows"], found["image_kb"]) == (150, 1.0)
    # Each row is its image and some 900 bytes of text, which compress well.
    assert 1000 <= 1e6 * found["mb_per_cpu_s"] / found["rows_per_cpu_s"] <= 2000
