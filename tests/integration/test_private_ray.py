"""A run with its own Ray keeps to itself: its ports are on loopback, and its token and sessions are its user's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.ports import is_loopback, listening
from support.tiny_runs import tiny_recipe


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for Ray, the paths of whose sockets may have 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.timeout(240)
def test_a_run_opens_no_port_to_the_network_and_no_secret_to_others(tmp_path: Path, short_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path / "runs", "private", optim={"max_steps": 2}, scaling={"num_workers": 2})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    variables = {"HOME": str(tmp_path), "RAY_TMPDIR": str(short_folder)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables
    command = [sys.executable, "-m", "orpo_ray", "train", str(tmp_path / "recipe.yaml")]
    found: dict[tuple[str, int], str] = {}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, umask=0o022) as run:
        while run.poll() is None:
            found |= listening(psutil.Process(run.pid))
            time.sleep(0.2)
        assert run.returncode == 0, run.communicate()[1]
    # gcs_server, raylet, its agents, the driver, the controller, the workers, torch's store and gloo
    assert len(found) >= 12, found
    assert all(is_loopback(host) for host, _ in found), found

    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    (sessions,) = short_folder.iterdir()
    assert list(sessions.glob("ray/session_*/logs"))
    assert sessions.stat().st_mode & 0o777 == 0o700
    # What is for others has one mode.
    final = tmp_path / "runs" / "private" / "final"
    assert {path.stat().st_mode & 0o777 for path in final.iterdir()} == {0o644}
