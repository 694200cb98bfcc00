"""`orpo-ray` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def orpo_ray(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orpo_ray", *arguments],
        capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | (env or {}),
    )  # fmt: skip
