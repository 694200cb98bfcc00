"""A small VLM with really pretrained halves, and pairs of people about images, where they are at hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import SHARED


def real_vlm_and_pairs(folder: Path) -> tuple[Path, Path]:
    """Assemble the model in a folder; skip the test where its parts are absent. Return model and nlvr's pairs."""
    tool, data = SHARED / "tools" / "assemble_real_vlm.py", SHARED / "data" / "nlvr"
    if not tool.is_file() or not data.is_dir():
        pytest.skip(f"{SHARED} is absent: it has the pretrained halves and the pairs of this test")
    model = folder / "vlm"
    subprocess.run([sys.executable, str(tool), str(model)], check=True, capture_output=True)
    return model, data / "pairs.jsonl"
