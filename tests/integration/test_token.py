"""A cluster that asks for a token: `cluster/local-head.sh`, and commands that have the token, another one, or none."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from orpo_ray.ray_cluster.new_ray import unused_ports
from support.paths import ROOT
from support.ports import is_loopback, listening
from support.runs import wait_until

QUICKSTART = str(ROOT / "recipes/quickstart.yaml")
CONNECT = "from orpo_ray.ray_cluster.start import start_ray; start_ray(); import ray; print(len(ray.nodes()))"
SCRIPTS = Path(sys.executable).parent
ATTEMPTS = 3  # to start a head


class Head(NamedTuple):
    """A head, and where its token is."""

    process: psutil.Process
    address: str
    token: Path


def without_ray(**variables: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Short, since the paths of Ray's sockets are limited.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for _ in range(ATTEMPTS):
            port = unused_ports(1)[0]
            process, is_up = start_head(port, Path(folder))
            if is_up:
                break
            end(process)
        assert is_up, (Path(folder) / "said").read_text()
        yield Head(process, f"127.0.0.1:{port}", Path(folder) / ".ray" / "auth_token")
        end(process)


def start_head(port: int, folder: Path) -> tuple[psutil.Popen, bool]:
    """Start a head. Returns its process, and whether Ray runs: Ray gives up after 30 s, as on a busy machine."""
    environment = without_ray(HOME=str(folder), RAY_TMPDIR=str(folder), PATH=f"{SCRIPTS}:{os.environ['PATH']}")
    command = [str(ROOT / "cluster/local-head.sh"), f"--port={port}", "--num-cpus=1", "--block"]
    said = folder / "said"
    with said.open("w") as out:
        process = psutil.Popen([*command, "--include-dashboard=false"], env=environment, stdout=out, stderr=out)
    wait_until(lambda: "Ray runtime started" in said.read_text() or process.poll() is not None, "the head")
    return process, process.poll() is None


def end(process: psutil.Popen) -> None:
    """End a head and its processes."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        for each in psutil.wait_procs([process, *family], timeout=20)[1]:
            each.kill()


@pytest.mark.parametrize(
    ("said", "variables"),
    [
        ("the cluster asks for a token, and none was given", {}),
        pytest.param(
            "the cluster refuses the token in RAY_AUTH_TOKEN",
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64},
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            "the cluster refuses the token in {wrong}",
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "{wrong}"},
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            "RAY_AUTH_MODE is token, and there is no token in ~/.ray/auth_token",
            {"RAY_AUTH_MODE": "token"},
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["none", "wrong", "wrong file", "no file"],
)
def test_commands_without_the_token_are_one_message_and_soon(
    head: Head, tmp_path: Path, said: str, variables: dict[str, str]
) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    own = {name: value.format(wrong=wrong) for name, value in variables.items()}
    environment = without_ray(HOME=str(tmp_path), RAY_ADDRESS=head.address, **own)
    command = [sys.executable, "-m", "orpo_ray", "train", QUICKSTART]
    # 5 s where nothing else runs, most of it imports; Ray itself would try for 40 s
    limit = 30
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=limit
    )
    assert done.returncode == 2, done.stderr
    assert f"error: RAY_ADDRESS: {said.format(wrong=wrong)} (found '{head.address}')" in done.stderr
    assert "fix: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert not re.search("0{20}|1{20}", done.stderr)  # the token stays secret


def test_the_token_opens_a_head_that_listens_on_loopback_only(head: Head) -> None:
    environment = without_ray(RAY_ADDRESS=head.address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(head.token))
    command = [sys.executable, "-c", CONNECT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert head.token.stat().st_mode & 0o077 == 0
    found = listening(head.process)
    assert len(found) >= 5, found
    assert all(is_loopback(host) for host, _ in found), found
