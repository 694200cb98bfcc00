"""The quickstart on an installation without its extra."""

from __future__ import annotations

import subprocess
import sys

from support.paths import ROOT


def test_the_quickstart_without_its_extra_is_one_message() -> None:
    code = """
import sys
sys.modules["easy_vqa"] = None  # what Python does when a package is absent
from orpo_ray.cli import main
sys.argv = ["orpo-ray", "train", "recipes/quickstart.yaml"]
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 2
    assert 'pip install "orpo-ray[quickstart]"' in result.stderr
    assert "Traceback" not in result.stderr
