"""A Ray that starts here, on a machine that is too busy for Ray's own time limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

START = "from orpo_ray.ray_cluster.start import start_ray; start_ray(); import ray; print(len(ray.nodes()))"
# Python imports this module first. Ray gives its agents 15 seconds; here, the one that imports most takes for ever.
SLOW_AGENTS = """
import sys, time
if any(argument.endswith("dashboard/agent.py") for argument in sys.orig_argv):
    time.sleep(600)
"""


def test_ray_starts_before_its_dashboard_agent_has(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_AGENTS)
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join(filter(None, (str(tmp_path), own.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", START],
        env=own | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
