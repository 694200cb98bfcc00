"""Jobs on a node that has Ray and nothing else: the runtime environments of `cluster/` install the rest."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orpo_ray.ray_cluster.new_ray import unused_ports
from support.commands import ray_job_submit
from support.local_head import Head, local_head, without_ray
from support.paths import ROOT

RAY = f"ray[default,train,tune,data]=={importlib.metadata.version('ray')}"


@pytest.fixture(scope="module")
def dashboard() -> str:
    return f"127.0.0.1:{unused_ports(1)[0]}"


@pytest.fixture(scope="module")
def head(dashboard: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head in an environment with Ray alone. Skips where no package index answers."""
    folder = tmp_path_factory.mktemp("node")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    installed = subprocess.run(
        [folder / "bin" / "pip", "install", "--quiet", RAY], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"needs a package index: {installed.stderr[-300:]}")
    port = dashboard.rpartition(":")[2]
    options = ("--num-cpus=3", "--object-store-memory=300000000", f"--dashboard-port={port}")
    with local_head(*options, scripts=folder / "bin", PYTHONPATH="") as found:
        yield found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["runtime_env", "runtime_env_uv"])
def test_the_quickstart_runs_on_a_node_without_orpo_ray(head: Head, dashboard: str, kind: str, tmp_path: Path) -> None:
    for each in ("cluster", "recipes", "orpo_ray"):
        shutil.copytree(ROOT / each, tmp_path / "project" / each, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--address", f"http://{dashboard}", "--working-dir", ".", "--runtime-env", f"cluster/{kind}.yaml")
    overrides = (f"checkpoint.storage={tmp_path}/runs", "optim.max_steps=4", "eval.max_pairs=16")
    done = ray_job_submit(
        *options, "--", "python", "-m", "orpo_ray", "train", "recipes/quickstart.yaml", *overrides,
        cwd=tmp_path / "project",
        env=without_ray(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=os.fspath(head.token)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "training, last step" in done.stdout
    assert (tmp_path / "runs" / "quickstart" / "final" / "config.json").is_file()
