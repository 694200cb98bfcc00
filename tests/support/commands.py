"""Run `orpo-ray` commands, in a new process or in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_ray.cli import main


def orpo_ray(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orpo_ray", *arguments],
        capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | (env or {}),
    )  # fmt: skip


def ray_job_submit(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Submit a folder with Ray's own command, as soon as Ray takes jobs, some seconds after its start."""
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", *arguments]
    for _ in range(6):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)
        if not any(text in done.stdout + done.stderr for text in ("No available agent", "have prematurely been")):
            break
        time.sleep(5)
    return done


def without_cluster() -> dict[str, str]:
    """Return an environment in which a command starts a Ray of its own."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def on_this_cluster() -> dict[str, str]:
    """Return an environment in which a command joins the Ray of this process."""
    import ray

    return os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def orpo_ray_here(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has all modules loaded."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["orpo-ray", *arguments])
        if cwd is not None:
            patch.chdir(cwd)
        with pytest.raises(SystemExit) as end:
            main()
    return subprocess.CompletedProcess(arguments, int(end.value.code or 0), out.getvalue(), err.getvalue())
