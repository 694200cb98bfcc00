"""`make root-tests` must not pass because its tests were skipped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT, TESTS

TEST = """
import pytest

def test_that_needs_something():
    pytest.skip("needs root")
"""


@pytest.mark.parametrize(("variables", "passes"), [({}, True), ({"ORPO_RAY_NO_SKIPS": "1"}, False)])
def test_a_skipped_test_fails_where_none_may_be(tmp_path: Path, variables: dict[str, str], passes: bool) -> None:
    (tmp_path / "test_skipped.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "conftest", "-c", os.devnull, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}"} | variables
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert (done.returncode == 0) == passes, done.stdout + done.stderr
    assert passes or "was skipped: " in done.stdout
    assert "needs root" in done.stdout or passes


def test_the_tests_that_skip_without_root_are_run_with_it() -> None:
    """What asks for root, itself or through a helper, is in the Makefile's list."""
    needs_root = re.compile(r"geteuid\(\)|\[\"unshare|from support\.(slurm|hosts|small_disk) import")
    asks = {path for path in TESTS.rglob("test_*.py") if needs_root.search(path.read_text())}
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile[makefile.index("\nroot-tests:") :].split("\n\n")[0]
    listed = {ROOT / path for path in re.findall(r"tests/\S+\.py", recipe)}
    assert asks == listed
