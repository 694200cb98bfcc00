"""A cluster that asks for a token: `cluster/local-head.sh`, and commands that have the token, another one, or none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.local_head import Head, local_head, without_ray
from support.paths import ROOT
from support.ports import is_loopback, listening

QUICKSTART = str(ROOT / "recipes/quickstart.yaml")
CONNECT = "from orpo_ray.ray_cluster.start import start_ray; start_ray(); import ray; print(len(ray.nodes()))"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with local_head("--num-cpus=1", "--include-dashboard=false") as found:
        yield found


def of_this_user(head: Head) -> dict[str, str]:
    """Return the variables of a user who has started the head. Of several heads of a machine, Ray takes the user's."""
    home = str(head.token.parents[1])
    return {"HOME": home, "RAY_TMPDIR": home}


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
    # The address that Ray finds by itself, with the token in the home folder, which it then presents unasked.
    environment = without_ray(RAY_ADDRESS="auto", **of_this_user(head))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert head.token.stat().st_mode & 0o077 == 0
    found = listening(head.process)
    assert len(found) >= 5, found
    assert all(is_loopback(host) for host, _ in found), found


def test_doctor_finds_the_head_of_this_machine_without_an_address(head: Head) -> None:
    environment = without_ray(RAY_AUTH_MODE="token", **of_this_user(head))
    command = [sys.executable, "-m", "orpo_ray", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    found = {each["check"]: each for each in json.loads(done.stdout)}
    assert found["nodes"]["value"].startswith("1: 127.0.0.1"), found
    assert "node pools" not in found  # a head without an autoscaler
    assert {name for name, each in found.items() if each["status"] != "ok"} == {"dashboard"}
    assert found["dashboard"]["value"] == "there is none"
    assert done.returncode == 0
