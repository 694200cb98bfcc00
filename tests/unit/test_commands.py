"""Commands: exit codes, messages, JSON."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from orpo_ray import __version__
from support.commands import orpo_ray, orpo_ray_here
from support.paths import ROOT
from support.tiny_runs import tiny_recipe


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "none.yaml"], "no such recipe"),
        (["train", str(ROOT / "recipes/quickstart.yaml"), "orpo.betta=1"], "did you mean 'beta'?"),
        (["train", str(ROOT / "recipes/quickstart.yaml"), "data.train=none.jsonl"], "no such file or folder"),
        (["train", str(ROOT / "recipes/quickstart.yaml"), "model.id=./none"], "model.id"),
        (["train", str(ROOT / "recipes/quickstart.yaml"), "data.image_root=/none"], "data.image_root: no such folder"),
        (["train", str(ROOT / "recipes/quickstart.yaml"), "checkpoint.storage=file"], "checkpoint.storage"),
        *(
            ([command, *arguments], said)
            for command, said_of_folder in (
                ("evaluate", "the folder is neither a run (no recipe.yaml) nor a model"),
                ("export", "the folder is no run (no recipe.yaml)"),
                ("report", "the folder is no run (no recipe.yaml)"),
            )
            for arguments, said in (
                (["nowhere"], "nowhere: no such folder"),
                (["a" * 300], "no such folder"),
                (["file"], "file: this is a file, not a folder"),
                (["."], said_of_folder),
            )
        ),
        (["evaluate", "broken-run"], "not valid YAML"),
        (["tune", str(ROOT / "recipes/quickstart.yaml"), "data.eval=[]"], "held-out pairs"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "broken-run").mkdir()
    (tmp_path / "broken-run" / "recipe.yaml").write_text("a: [")
    result = orpo_ray_here(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_version() -> None:
    result = orpo_ray_here("--version")
    assert (result.returncode, result.stdout) == (0, f"orpo-ray {__version__}\n")


def test_schema_is_json() -> None:
    assert "optim" in json.loads(orpo_ray_here("schema").stdout)["properties"]


@pytest.mark.parametrize(
    "host",
    ["[::1]", *(pytest.param(host, marks=pytest.mark.nightly) for host in ("127.0.0.1", "no-such-host.invalid"))],
)
def test_an_address_without_a_cluster_is_one_message(host: str, tmp_path: Path) -> None:
    quickstart = str(ROOT / "recipes/quickstart.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"{host}:{port}"
    result = orpo_ray("train", quickstart, cwd=tmp_path, env={"RAY_ADDRESS": address})
    assert result.returncode == 2, result.stderr
    assert "RAY_ADDRESS" in result.stderr
    assert address in result.stderr
    assert "Traceback" not in result.stderr


def test_a_ray_that_does_not_start_is_one_message(tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 60)  # the paths of Ray's sockets are limited
    result = orpo_ray("train", str(ROOT / "recipes/quickstart.yaml"), cwd=tmp_path, env={"RAY_TMPDIR": str(too_long)})
    assert result.returncode == 1, result.stderr
    assert "Ray did not start on this machine" in result.stderr
    assert f"{too_long}/orpo-ray-{os.getuid()}/ray/session_latest/logs" in result.stderr.replace("\n", "")
    assert "Traceback" not in result.stderr


def test_a_cluster_that_does_not_answer_leaves_no_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    recipe = tiny_recipe(tmp_path / "runs", "nothing")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    result = orpo_ray("train", str(path), cwd=tmp_path)
    assert result.returncode == 2
    assert "no Ray cluster answers at this address" in result.stderr
    assert not (tmp_path / "runs" / "nothing").exists()
    assert not list((tmp_path / "runs").iterdir())
