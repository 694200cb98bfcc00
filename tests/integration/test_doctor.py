"""`orpo-ray doctor` on a cluster of three nodes with planted faults."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import files, version
from pathlib import Path

import pytest
from ray._raylet import GcsClient
from ray.util import get_node_ip_address

from support.commands import orpo_ray
from support.local_head import running_ray
from support.paths import ROOT
from support.runs import wait_until
from support.tiny_runs import tiny_recipe

OTHER_TORCH = "2.0.1"
SMALLEST_STORE = 78_643_200  # bytes; Ray takes no less


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def storage() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def cluster(tmp_path: Path, storage: Path) -> Iterator[str]:
    """Three nodes: a head whose dashboard is open to all, one to which the storage is read-only, and one whose
    environment has no orpo-ray and another version of torch.

    Returns the address.
    """
    allowed = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip("needs the right to mount a read-only folder for one node")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    environment["RAY_AUTH_MODE"] = "disabled"
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    common = ["--num-cpus=1", "--block", "--disable-usage-stats"]
    read_only = f'mount --bind "{storage}" "{storage}" && mount -o remount,ro,bind "{storage}"'

    def node(mounts: str) -> list[str]:
        """Return the command of a node in which something is mounted that the others do not see."""
        join = [*ray, "start", f"--address={address}", "--object-store-memory=300000000", *common]
        return ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *join]

    starts = [
        [*ray, "start", "--head", f"--port={port}", "--dashboard-host=0.0.0.0", f"--dashboard-port={free_port()}",
         f"--object-store-memory={SMALLEST_STORE}", f"--ray-client-server-port={free_port()}", *common],
        node(read_only),
        node(other_environment(tmp_path)),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        environment |= {"RAY_TMPDIR": folder, "HOME": folder}
        for number, command in enumerate(starts):
            stack.enter_context(running_ray(command, environment, Path(folder, f"said-{number}"), Path(folder)))
        wait_until(lambda: len(GcsClient(address=address).get_all_node_info()) == 3, "all nodes", 60)
        yield address


def other_environment(folder: Path) -> str:
    """Return shell commands that hide orpo-ray behind empty folders, and give torch another version.

    Nodes on one machine import from the same folders, and from those of the driver.
    """
    empty = folder / "empty"
    empty.mkdir()
    packages = [Path(each) / "orpo_ray" for each in sys.path]
    mounts = [f'mount --bind "{empty}" "{each}"' for each in packages if (each / "__init__.py").is_file()]
    (metadata,) = (file.locate() for file in files("torch") or () if file.name == "METADATA")
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {OTHER_TORCH}\n")
    return " && ".join([*mounts, f'mount --bind "{folder / "METADATA"}" "{metadata}"'])


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_node_with_another_environment_is_named() -> None:
    """The second node runs in the environment that `make torchvision-tests` makes, with another torch."""
    environments = (ROOT / ".venv", ROOT / ".venv-torchvision")
    other = next((each / "bin" / "python" for each in environments if each != Path(sys.prefix)), None)
    if other is None or not other.exists():
        pytest.skip("needs a second environment with orpo-ray: run `make torchvision-tests`")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    environment["RAY_AUTH_MODE"] = "disabled"
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        environment |= {"RAY_TMPDIR": folder, "HOME": folder}
        for python, options in ((sys.executable, head), (str(other), [f"--address={address}"])):
            ray = [python, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block", "--disable-usage-stats"]
            said = Path(folder, "said" if options is head else "said-other")
            stack.enter_context(running_ray([*ray, *options], environment, said, Path(folder)))
        wait_until(lambda: len(GcsClient(address=address).get_all_node_info()) == 2, "both nodes", 60)
        done = orpo_ray("doctor", "--address", address, "--json", env={"RAY_AUTH_MODE": "disabled"})
    assert "Traceback" not in done.stderr
    found = {each["check"]: each for each in json.loads(done.stdout)}
    torch = found["version of torch"]
    assert torch["status"] == "fix", torch
    for python in (sys.executable, str(other)):
        version = subprocess.run(
            [python, "-c", "from importlib.metadata import version; print(version('torch'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        assert version in torch["value"], torch


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_nodes_that_have_gpus_by_their_own_account_try_nccl_and_say_why_it_fails(tmp_path: Path) -> None:
    """Two nodes with a planted nvidia-smi and no GPU, so that probes with a GPU start and the meeting itself fails."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("with a GPU, NCCL does not fail")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA L4, 520.61.05, 23034 MiB'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        environment |= {"RAY_TMPDIR": folder, "HOME": folder}
        for number, options in enumerate((head, [f"--address={address}"])):
            ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--num-gpus=1", "--block"]
            said = Path(folder, f"said-{number}")
            stack.enter_context(running_ray([*ray, *options], environment, said, Path(folder)))
        wait_until(lambda: len(GcsClient(address=address).get_all_node_info()) == 2, "both nodes", 60)
        done = orpo_ray("doctor", "--address", address, "--json", env={"RAY_AUTH_MODE": "disabled"})
    assert "Traceback" not in done.stderr
    found = {each["check"]: each for each in json.loads(done.stdout)}
    assert found["gloo between nodes"]["value"] == "2 nodes added up a number"
    assert found["NCCL between nodes"]["status"] == "fix"
    assert re.search("NCCL|CUDA|GPU", found["NCCL between nodes"]["value"]), found["NCCL between nodes"]
    assert found["CUDA of torch"]["status"] == "fix"  # without CUDA, or for one that needs a newer driver


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_planted_faults_are_found_and_named_with_their_fix(cluster: str, storage: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(storage, "doctor", optim={"pairs_per_step": 32})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    arguments = ("doctor", str(tmp_path / "recipe.yaml"), "--address", cluster, "--json")
    done = orpo_ray(*arguments, env={"RAY_AUTH_MODE": "disabled"})
    assert done.returncode == 1, done.stderr
    found = {each["check"]: each for each in json.loads(done.stdout)}
    assert "Traceback" not in done.stderr
    said = {name: each["value"] for name, each in found.items() if each["status"] == "fix"}
    assert "Read-only file system" in said.pop("storage")
    assert "listens on 0.0.0.0" in said.pop("dashboard address")
    assert "whoever reaches a port" in said.pop("token")
    assert "75 MiB on " in said.pop("object store")
    where = said.pop("version of orpo-ray").rpartition("missing on ")[2]
    assert said.pop("version of torch") == f"{version('torch')} here, {OTHER_TORCH} on {where}"
    assert not said, said
    assert found["nodes"]["value"].startswith("3: ")
    assert found["gloo between nodes"]["value"] == "2 nodes added up a number"
    assert found["clocks"]["status"] == found["disk"]["status"] == found["version of numpy"]["status"] == "ok"
    assert not list(storage.iterdir())  # it cleans up behind itself
    for each in found.values():
        assert (each["fix"] is None) == (each["status"] == "ok")
    lines = [line for line in done.stderr.splitlines() if line.startswith(("ok", "warning", "fix"))]
    assert len(lines) == len(found)
