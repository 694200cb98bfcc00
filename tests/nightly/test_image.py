"""What `cluster/Dockerfile` installs, with the uv that it pins and package indexes on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.cluster_files import CLUSTER

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
TORCH = "2.13.0"


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned uv. Skips where no package index answers."""
    folder = tmp_path_factory.mktemp("uv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (pinned,) = re.findall(r"uv==[\d.]+", DOCKERFILE)
    installed = subprocess.run(
        [folder / "bin" / "pip", "install", "--quiet", pinned], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"needs a package index: {installed.stderr[-300:]}")
    return folder / "bin" / "uv"


def index(folder: Path, version: str) -> str:
    """Make a package index with one version of a torch, and return its address."""
    files = {
        "torch.py": f"__version__ = '{version}'\n",
        f"torch-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"torch-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    name = f"torch-{version}-py3-none-any.whl"
    (folder / "torch").mkdir(parents=True)
    with zipfile.ZipFile(folder / "torch" / name, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        record = f"torch-{version}.dist-info/RECORD"
        wheel.writestr(record, "".join(f"{path},,\n" for path in [*files, record]))
    (folder / "torch" / "index.html").write_text(f'<a href="{name}">{name}</a>')
    return folder.as_uri()


@pytest.mark.parametrize(("asked", "version"), [("cpu", f"{TORCH}+cpu"), ("pypi", TORCH)])
def test_torch_comes_from_the_index_that_was_asked_for(uv: Path, tmp_path: Path, asked: str, version: str) -> None:
    addresses = {"cpu": index(tmp_path / "cpu", f"{TORCH}+cpu"), "pypi": index(tmp_path / "pypi", TORCH)}
    environment = {"PATH": f"{uv.parent}:{os.environ['PATH']}", "UV_NO_CACHE": "1", "TORCH_INDEX": addresses[asked]}
    subprocess.run([uv, "venv", "--python", sys.executable, tmp_path / "venv"], env=environment, check=True)
    (tmp_path / "requirements.txt").write_text(f"torch=={TORCH}\n")
    (command,) = re.findall(r"^RUN (uv pip install (?:.*\\\n)*?.*grep .*)\\$", DOCKERFILE, flags=re.MULTILINE)
    command = command.replace("/tmp/requirements.txt", f"{tmp_path}/requirements.txt")
    command = command.replace("/opt/orpo-ray", f"{tmp_path}/venv").replace("https://pypi.org/simple", addresses["pypi"])
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", "import torch; print(torch.__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert printed == version
