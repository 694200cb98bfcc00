"""The files in `cluster/` are what their readers take, and a misspelt key in any of them is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.runtime_env import RuntimeEnv

from orpo_ray.config.load import load_recipe
from orpo_ray.errors import UserError
from orpo_ray.jobs.runtime_env import read_runtime_env
from support.cluster_files import (
    CLUSTER,
    kuberay_definition,
    kubernetes_problems,
    launcher_problems,
    load,
    skypilot_problems,
)
from support.paths import ROOT

LAUNCHER = sorted(CLUSTER / f"{name}.yaml" for name in ("aws", "azure", "gcp", "local"))
MANIFESTS = sorted(path for path in (CLUSTER / "kuberay").rglob("*.yaml") if path.name != "kustomization.yaml")
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
RAY = "2.60.0"
TRIED = 4  # misspelt keys in each document
# Keys that a user names, so that no schema can know them.
FREE = {"labels", "matchLabels", "nodeSelector", "file_mounts", "envs", "secrets", "env_vars", "rayStartParams",
        "job_recovery", "requests", "limits", "accelerators", "available_node_types", "resources",
        "selector"}  # fmt: skip


def check_of(path: Path) -> Callable[[Any], list[str]]:
    if path in LAUNCHER:
        return launcher_problems
    return skypilot_problems if path.name == "skypilot.yaml" else kubernetes_problems


def misspelt(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path of each key that a schema knows, and a copy of the value in which it is misspelt."""
    if isinstance(value, dict):
        for key, each in value.items():
            if above not in FREE:
                wrong = {(f"{name}x" if name == key else name): other for name, other in value.items()}
                yield key, wrong
            for path, changed in misspelt(each, key):
                yield f"{key}.{path}", value | {key: changed}
    elif isinstance(value, list):
        for index, each in enumerate(value):
            for path, changed in misspelt(each, above):
                yield f"{index}.{path}", [*value[:index], changed, *value[index + 1 :]]


@pytest.mark.parametrize("path", [*LAUNCHER, *MANIFESTS, CLUSTER / "skypilot.yaml"], ids=lambda path: path.name)
def test_a_file_is_valid(path: Path) -> None:
    for document in load(path):
        assert not check_of(path)(document), path


@pytest.mark.parametrize("path", [*LAUNCHER, *MANIFESTS, CLUSTER / "skypilot.yaml"], ids=lambda path: path.name)
def test_a_misspelt_key_is_found(path: Path) -> None:
    """Some keys of different names, from the whole file."""
    check = check_of(path)
    for document in load(path):
        by_name: dict[str, tuple[str, Any]] = {}
        for where, wrong in misspelt(document):
            known = where.split(".")[0] in ("provider", "apiVersion", "kind")  # tells which schema it is
            if not known:
                by_name.setdefault(where.split(".")[-1], (where, wrong))
        found = list(by_name.values())
        for where, wrong in found[:: max(1, len(found) // TRIED)]:
            try:
                problems = check(wrong)
            except (KeyError, TypeError) as error:  # a key that must be there
                problems = [repr(error)]
            assert problems, f"{where} was misspelt, and nobody noticed"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_fits_the_whole_definition_of_kuberay(path: Path) -> None:
    for document in load(path):
        if document["apiVersion"] != "ray.io/v1":
            continue
        schema = kuberay_definition(document["kind"])
        if schema is None:
            pytest.skip("KubeRay's definitions are not beside the checkout; the part without pods is tested above")
        jsonschema.Draft202012Validator(schema).validate(document)


def test_kustomize_builds_all_that_the_cluster_needs() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    built = subprocess.run(["kubectl", "kustomize", CLUSTER / "kuberay"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    documents = list(yaml.safe_load_all(built.stdout))
    kinds = sorted(each["kind"] for each in documents)
    assert kinds == ["Namespace", "NetworkPolicy", "PersistentVolumeClaim", "PriorityClass", "PriorityClass",
                     "PriorityClass", "RayCluster", "Service", "StatefulSet"]  # fmt: skip
    for document in documents:
        assert not kubernetes_problems(document)


def test_kustomize_refuses_a_misspelt_key(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    folder = tmp_path / "kuberay"
    shutil.copytree(CLUSTER / "kuberay", folder)
    (kustomization,) = load(folder / "kustomization.yaml")
    found = {where.split(".")[-1]: (where, wrong) for where, wrong in misspelt(kustomization)}
    assert {"resources", "images", "newName", "newTag"} <= set(found)
    for where, wrong in found.values():
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(wrong))
        built = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
        assert built.returncode != 0, f"{where} was misspelt, and nobody noticed"


def test_a_run_of_skypilot_has_a_worker_for_each_gpu(tmp_path: Path) -> None:
    """Runs the task's script up to the command, and loads the recipe as the command would."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text('orpo-ray() { printf "%s\\n" "$@"; env >environment; }\n')
    (task,) = load(CLUSTER / "skypilot.yaml")
    given = task["envs"] | {"STORAGE": "s3://bucket/runs", "OVERRIDES": "name=mine optim.max_steps=5"}
    done = subprocess.run(
        ["bash", "-c", task["run"].replace("exec orpo-ray", "orpo-ray")],
        env={"PATH": os.environ["PATH"], "SKYPILOT_NUM_GPUS_PER_NODE": "4", **given, **task["secrets"]},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    command, recipe, *overrides = done.stdout.splitlines()
    loaded = load_recipe(ROOT / recipe, overrides)
    assert (command, loaded.name, loaded.scaling.num_workers) == ("train", "mine", 4)
    assert (loaded.checkpoint.storage, loaded.optim.max_steps) == ("s3://bucket/runs", 5)
    assert "WANDB_API_KEY" not in (tmp_path / "environment").read_text()  # an empty one would make W&B ask


def test_nothing_is_open_and_every_version_is_pinned() -> None:
    for path in LAUNCHER:
        config = load(path)[0]
        start = " ".join(config["head_start_ray_commands"])
        assert "--dashboard-host=127.0.0.1" in start
        for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
            assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
        assert f"=={RAY}" in " ".join(config["setup_commands"])
    for path in MANIFESTS:
        for document in load(path):
            spec = document.get("spec", {}).get("rayClusterSpec", document.get("spec", {}))
            if document["apiVersion"] == "ray.io/v1":
                assert spec["authOptions"] == {"mode": "token"}
                assert spec["rayVersion"] == RAY
                assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert RAY in (CLUSTER / "skypilot.yaml").read_text()
    assert f"=={RAY}" in (CLUSTER / "Dockerfile").read_text()


def test_every_pool_starts_from_zero_and_the_head_runs_no_tasks() -> None:
    for path in LAUNCHER:
        config = load(path)[0]
        for name, kind in config.get("available_node_types", {}).items():
            assert kind.get("min_workers", 0) == 0
            if name == config["head_node_type"]:
                assert kind["resources"] == {"CPU": 0}
            else:
                assert {"orpo-ray/pool", "ray.io/market-type"} <= set(kind["labels"])
        assert config["idle_timeout_minutes"] <= 10
    cluster = load(CLUSTER / "kuberay" / "raycluster.yaml")[0]["spec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {group["minReplicas"] for group in cluster["workerGroupSpecs"]} == {0}


@pytest.mark.parametrize("name", ["runtime_env.yaml", "runtime_env_uv.yaml"])
def test_a_runtime_environment_is_taken_by_ray_and_pinned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    raw = load(CLUSTER / name)[0]
    parsed = RuntimeEnv(**raw)
    packages = next(parsed[kind]["packages"] for kind in ("pip", "uv") if kind in parsed)
    requirements = [Requirement(line) for line in packages if not line.startswith("#")]
    assert all([each.operator for each in found.specifier] == ["=="] for found in requirements)
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    for where, wrong in misspelt(raw):
        path = tmp_path / f"{where}.yaml"
        path.write_text(yaml.safe_dump(wrong))
        with pytest.raises(UserError, match=r"unknown field|can only have these fields"):
            read_runtime_env(str(path), ROOT, recipe)


def test_the_pinned_packages_are_those_that_the_project_asks_for() -> None:
    lines = [
        line
        for line in (CLUSTER / "requirements.txt").read_text().splitlines()
        if line and not line.startswith(("#", " "))
    ]
    pinned = {canonicalize_name(found.name): str(found.specifier)[2:] for found in map(Requirement, lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["wandb"]):
        wanted = Requirement(text)
        if wanted.name != "ray":
            assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text
    assert not {name for name in pinned if name.startswith(("nvidia-", "ray"))}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing_in_the_image_and_finds_a_misspelt_instruction(tmp_path: Path) -> None:
    checker = Path(sys.executable).with_name("hadolint")
    text = (CLUSTER / "Dockerfile").read_text()
    done = subprocess.run([checker, CLUSTER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "Dockerfile").write_text(text.replace("HEALTHCHECK", "HEALTCHECK"))
    wrong = subprocess.run([checker, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert wrong.returncode != 0


def test_the_image_runs_as_a_user_and_holds_no_secret() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    words = [line.split()[0] for line in lines if line and line[0].isupper()]
    assert words.index("USER") < words.index("HEALTHCHECK")
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    for line in lines:
        assert not re.search(r"TOKEN=|SECRET|PASSWORD|API_KEY", line), line
        assert not line.startswith("FROM") or re.search(r":\d+\.\d+\.\d+", line), "a base image is pinned"


def _run_of(text: str) -> str:
    """Return the shell command of the Dockerfile's instruction RUN that has a text."""
    instructions = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    (found,) = [line.removeprefix("RUN ") for line in instructions if line.startswith("RUN ") and text in line]
    return found


@pytest.mark.parametrize(("index", "cuda", "is_right"), [
    ("https://download.pytorch.org/whl/cpu", None, True),
    ("https://download.pytorch.org/whl/cpu", "13.0", False),
    ("https://pypi.org/simple", "13.0", True),
])  # fmt: skip
def test_an_image_for_cpus_is_not_built_with_the_torch_for_gpus(
    index: str, cuda: str | None, is_right: bool, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text(
        f"from types import SimpleNamespace\n__version__, version = '2', SimpleNamespace(cuda={cuda!r})\n"
    )
    command = _run_of("torch.version.cuda").replace("/opt/orpo-ray/bin/python", sys.executable)
    command = "uv() { :; }\n" + command
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "TORCH_INDEX": index}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == is_right, done.stderr
    assert is_right or "is built for CUDA" in done.stderr


def test_the_image_has_the_compiler_that_triton_needs() -> None:
    installed = _run_of("apt-get install").split()
    assert {"gcc", "libc6-dev"} <= {word.partition("=")[0] for word in installed}
