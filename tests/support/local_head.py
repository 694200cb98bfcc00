"""A Ray head that `cluster/local-head.sh` starts, with its token in a home folder of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from orpo_ray.ray_cluster.new_ray import unused_ports
from support.paths import ROOT
from support.runs import wait_until

SCRIPTS = Path(sys.executable).parent
ATTEMPTS, STARTED = 3, 300  # starts of a node, and seconds of each


class Head(NamedTuple):
    """A head, and where its token is."""

    process: psutil.Process
    address: str
    token: Path


def without_ray(**variables: str) -> dict[str, str]:
    """Return the environment of this process without Ray's variables, and with these ones."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables


@contextmanager
def local_head(*options: str, scripts: Path = SCRIPTS, **variables: str) -> Iterator[Head]:
    """Start a head, and end it.

    Args:
        options: of `ray start`.
        scripts: folder of the program `ray`.
        variables: of its environment.
    """
    # Short, since the paths of Ray's sockets are limited.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        port = unused_ports(1)[0]
        command = [str(ROOT / "cluster/local-head.sh"), f"--port={port}", "--block", *options]
        own = {"HOME": folder, "RAY_TMPDIR": folder, "PATH": f"{scripts}:{os.environ['PATH']}"}
        with running_ray(command, without_ray(**own, **variables), Path(folder) / "said") as process:
            yield Head(process, f"127.0.0.1:{port}", Path(folder) / ".ray" / "auth_token")


@contextmanager
def running_ray(
    command: list[str], environment: dict[str, str], said: Path, cwd: Path | None = None
) -> Iterator[psutil.Process]:
    """Run a command that starts a node of Ray and waits, and end it with all its processes.

    Ray gives up after 30 s, as on a busy machine; then the command is run again.

    Args:
        command: the command.
        environment: its environment.
        said: file for what it prints.
        cwd: its working directory.
    """
    for _ in range(ATTEMPTS):
        with said.open("w") as out:
            process = psutil.Popen(command, env=environment, stdout=out, stderr=out, cwd=cwd)
        try:
            wait_until(partial(_is_decided, process, said), "a node", STARTED)
            if process.poll() is None:
                yield process
                return
        finally:
            _end(process)
    raise AssertionError(said.read_text())


def _is_decided(process: psutil.Popen, said: Path) -> bool:
    """Whether Ray runs, or the command has ended."""
    return "Ray runtime started" in said.read_text() or process.poll() is not None


def _end(process: psutil.Popen) -> None:
    """End a command and its processes."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        for each in psutil.wait_procs([process, *family], timeout=20)[1]:
            each.kill()
