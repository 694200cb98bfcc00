"""`make gpu` without a GPU: every test is collected, and one line says why none ran."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from support.device_idle import idle_fraction
from support.paths import ROOT, TESTS


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "gpu", "tests/gpu"],
        cwd=ROOT, env=os.environ | {"ORPO_RAY_GPU_TESTS_ON": "cuda"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    reasons = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(reasons) == 1, reasons
    assert "no GPU on this machine" in reasons[0]
    assert " passed" not in result.stdout


def test_every_file_has_the_mark() -> None:
    files = sorted((TESTS / "gpu").glob("test_*.py"))
    assert len(files) >= 5
    assert all("pytest.mark.gpu" in file.read_text() for file in files)


def test_idle_time_is_what_no_kernel_covers() -> None:
    """0 to 4 and 6 to 10 are covered, in part twice; 4 to 6 is idle."""
    assert idle_fraction([(6, 9), (0, 3), (1, 4), (7, 10), (2, 3)]) == pytest.approx(0.2)
    assert idle_fraction([(1, 2)]) == 0
