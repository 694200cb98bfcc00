"""The code of tests/gpu runs, on the CPU: a machine with a GPU should find errors of the package, not of its tests."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support.paths import ROOT


@pytest.mark.timeout(1200)
def test_the_gpu_tests_pass_on_the_cpu() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"],
        cwd=ROOT, env=os.environ | {"ORPO_RAY_GPU_TESTS_ON": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:]
    assert " skipped" not in result.stdout
