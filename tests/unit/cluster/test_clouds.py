"""What the launcher's files need from a cloud: rights, images, secrets, and files that stay at home."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import boto3
import pytest
from packaging.requirements import Requirement
from ray.autoscaler._private.command_runner import SSHCommandRunner
from ray.autoscaler._private.util import prepare_config

from orpo_ray.jobs.secrets import SECRET_FILES
from orpo_ray.planning.gpus import GPUS
from support.cluster_files import CLUSTER, load
from support.paths import ROOT

LAUNCHER = ("aws", "azure", "gcp", "local")
REGION, BUCKET = "us-west-2", "my-bucket"
POLICIES = CLUSTER / "aws-iam"


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = load(CLUSTER / f"{name}.yaml")[0]
    return found


def policy(role: str) -> list[dict[str, Any]]:
    document = json.loads((POLICIES / f"{role}.json").read_text())
    assert set(document) == {"Version", "Statement"}
    statements: list[dict[str, Any]] = document["Statement"]
    return statements


def actions(role: str) -> set[str]:
    listed = [statement["Action"] for statement in policy(role)]
    return {action for each in listed for action in ([each] if isinstance(each, str) else each)}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A simulated AWS on loopback, which this process and its children use."""
    pytest.importorskip("moto", reason="moto's server is not installed")
    from moto.backends import get_backend
    from moto.server import DomainDispatcherApplication, create_backend_app
    from ray.autoscaler._private.aws import utils
    from werkzeug.serving import make_server

    for service in ("ec2", "iam", "secretsmanager"):
        get_backend(service).reset()  # of an earlier test of this process
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a key into ~/.ssh
    try:
        yield
    finally:
        utils.resource_cache.cache_clear()  # the next server has another port
        utils.client_cache.cache_clear()
        server.shutdown()
        thread.join()


def make_roles(iam: Any) -> None:
    """As docs/clusters.md says."""
    trust = (POLICIES / "trust.json").read_text()
    for role in ("head", "worker"):
        name = f"orpo-ray-{role}"
        document = (POLICIES / f"{role}.json").read_text().replace("BUCKET", BUCKET)
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
        iam.put_role_policy(RoleName=name, PolicyName="orpo-ray", PolicyDocument=document)
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def test_iam_takes_the_policies_and_workers_can_start_nothing(aws: None) -> None:
    iam = boto3.client("iam", REGION)
    make_roles(iam)  # refuses a policy that is not well formed
    for role in ("head", "worker"):
        for statement in policy(role):
            assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
            assert statement["Effect"] == "Allow"
            resources = statement["Resource"]
            assert resources != "*" or statement["Action"] == "ec2:DescribeInstances"
        assert all("*" not in action for action in actions(role))
    assert {action.split(":")[0] for action in actions("worker")} == {"s3", "secretsmanager"}
    assert policy("worker") == policy("head")[-len(policy("worker")) :]
    (passed,) = [statement for statement in policy("head") if statement["Action"] == "iam:PassRole"]
    pools = config("aws")["available_node_types"]
    profiles = {name: pool["node_config"]["IamInstanceProfile"]["Name"] for name, pool in pools.items()}
    assert profiles.pop("head") == "orpo-ray-head"
    assert set(profiles.values()) == {"orpo-ray-worker"} == {passed["Resource"].split("/")[-1]}
    cluster = config("aws")["cluster_name"]
    bound = [statement["Condition"]["StringEquals"] for statement in policy("head") if "Condition" in statement]
    for tag in ("aws:RequestTag/ray-cluster-name", "aws:ResourceTag/ray-cluster-name"):
        assert {tag: cluster} in bound


def test_the_documented_commands_make_the_roles_and_the_secrets(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("aws") is None:
        pytest.skip("needs AWS's command line")
    blocks = (ROOT / "docs" / "clusters.md").read_text().split("```bash\n")
    (commands,) = (block.split("```")[0] for block in blocks if "aws iam create-role" in block)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("HF_TOKEN", "token")
    done = subprocess.run(["bash", "-euc", commands], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    iam, store = boto3.client("iam", REGION), boto3.client("secretsmanager", REGION)
    for role in ("head", "worker"):
        profile = iam.get_instance_profile(InstanceProfileName=f"orpo-ray-{role}")["InstanceProfile"]
        assert [each["RoleName"] for each in profile["Roles"]] == [f"orpo-ray-{role}"]
        given = iam.get_role_policy(RoleName=f"orpo-ray-{role}", PolicyName="orpo-ray")["PolicyDocument"]
        assert given["Statement"][-1]["Resource"] == f"arn:aws:s3:::{BUCKET}/*"
    assert store.get_secret_value(SecretId="orpo-ray/wandb")["SecretString"] == "key"


def test_the_limit_of_the_cost_is_that_of_the_pools() -> None:
    prices = {gpu.name.split("-")[0]: gpu.price for gpu in GPUS}
    total = 0.0
    for pool in config("aws")["available_node_types"].values():
        for name in pool["resources"]:
            if name.startswith("accelerator_type:"):
                total += pool["max_workers"] * pool["resources"]["GPU"] * prices[name.partition(":")[2]]
    assert f"US$ {total:.2f} per hour" in " ".join((ROOT / "docs" / "clusters.md").read_text().split())


def test_the_head_may_do_what_ray_does_there(aws: None) -> None:
    """Ray's own provider starts, tags and ends a node of each pool."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    iam = boto3.client("iam", REGION)
    make_roles(iam)
    ready = bootstrap_aws(prepare_config(config("aws")))
    made = {each["RoleName"] for each in iam.list_roles()["Roles"]}
    assert made == {"orpo-ray-head", "orpo-ray-worker"}  # Ray has made none
    image = boto3.client("ec2", REGION).describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    calls: set[str] = set()
    for resource in (provider.ec2, provider.ec2_fail_fast):
        resource.meta.client.meta.events.register("before-call.ec2", lambda model, **_: calls.add(model.name))
    for pool, kind in ready["available_node_types"].items():
        node = kind["node_config"] | {"ImageId": image}  # the simulation resolves no parameters
        provider.create_node(node, {"ray-node-kind": "worker", "ray-node-name": pool}, 1)
    nodes = provider.non_terminated_nodes({})
    assert len(nodes) == len(ready["available_node_types"])
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    assert provider.internal_ip(nodes[0])
    provider.terminate_nodes(nodes)
    assert {"RunInstances", "CreateTags", "TerminateInstances"} <= calls
    assert {f"ec2:{call}" for call in calls} == {action for action in actions("head") if action.startswith("ec2:")}
    assert "ssm:GetParameters" in actions("head") or "resolve:ssm" not in (CLUSTER / "aws.yaml").read_text()


def test_gpu_nodes_on_google_get_a_disk_and_a_driver_that_fit() -> None:
    gcp = config("gcp")
    for pool in gcp["available_node_types"].values():
        (disk,) = (each["initializeParams"] for each in pool["node_config"]["disks"])
        assert disk["diskType"] == f"zones/{gcp['provider']['availability_zone']}/diskTypes/pd-balanced"
        assert int(disk["sourceImage"].rpartition("-")[2]) >= 580  # torch is built for CUDA 13


@pytest.mark.parametrize("name", LAUNCHER)
def test_every_package_of_a_node_is_pinned_and_ray_adds_none(name: str) -> None:
    found = config(name)
    ready = prepare_config(found)
    assert ready["head_setup_commands"] == ready["worker_setup_commands"] == found["setup_commands"]
    installed = set()
    for command in found["setup_commands"]:
        if "pip install" not in command:
            continue
        words = shlex.split(command)[shlex.split(command).index("install") + 1 :]
        after_option = {
            words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--python", "--requirements", "--editable")
        }
        for word in words:
            if not word.startswith("-") and word not in after_option:
                pin = Requirement(word)
                assert [each.operator for each in pin.specifier] == ["=="], word
                installed.add(pin.name)
    needed = {"aws": {"boto3"}, "gcp": {"google-api-python-client"}, "azure": {"azure-identity", "msrestazure"}}
    assert needed.get(name, set()) | {"ray", "uv"} <= installed


def test_the_packages_of_a_node_on_aws_can_be_installed_together() -> None:
    """The tests' boto3 and its core accept what requirements.txt pins."""
    text = [line for line in (CLUSTER / "requirements.txt").read_text().splitlines() if line and line[0] not in "# "]
    pins = {pin.name: next(iter(pin.specifier)).version for pin in map(Requirement, text)}
    checked = []
    for wanted in (Requirement(each) for name in ("boto3", "botocore") for each in requires(name) or ()):
        if wanted.name in pins and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            assert wanted.specifier.contains(pins[wanted.name]), wanted
            checked.append(wanted.name)
    assert "python-dateutil" in checked


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_shell_on_a_node_finds_the_environment_and_presents_the_token(name: str) -> None:
    appended = [each for each in config(name)["setup_commands"] if each.endswith(">> ~/.bashrc")]
    assert ["venv/bin/activate" in appended[0], "RAY_AUTH_MODE=token" in appended[1]] == [True, True]


@pytest.mark.parametrize("name", LAUNCHER)
def test_secrets_in_the_checkout_stay_there_and_the_token_is_copied(name: str) -> None:
    ignored = (ROOT / ".rayignore").read_text().splitlines()
    assert set(SECRET_FILES) <= set(ignored)
    found = config(name)
    assert {".gitignore", ".rayignore"} <= set(found["rsync_filter"])
    # These hold for every file that Ray copies, also for the token and for the SSH key (`ray-autoscaler_...pem`).
    assert not [each for each in found["rsync_exclude"] if fnmatch("auth_token", each) or fnmatch("key.pem", each)]


def test_rsync_keeps_back_what_rayignore_names(tmp_path: Path) -> None:
    """With the options that Ray's launcher gives it."""
    if shutil.which("rsync") is None:
        pytest.skip("needs rsync")
    here, there = tmp_path / "here", tmp_path / "there"
    kept_back = [pattern.replace("*", "x").rstrip("/") for pattern in SECRET_FILES]
    for folder in (here, here / "orpo_ray"):
        folder.mkdir()
        (folder / "module.py").touch()
        for name in kept_back:
            (folder / name).touch() if f"{name}/" not in SECRET_FILES else (folder / name).mkdir()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, here)
    there.mkdir()
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "auth_token").touch()
    (keys / "ray.pem").touch()
    options = {key: config("aws")[key] for key in ("rsync_exclude", "rsync_filter")}
    arguments = SSHCommandRunner._create_rsync_filter_args(None, options)
    for source in (f"{here}/", f"{keys}/auth_token", f"{keys}/ray.pem"):
        subprocess.run(["rsync", "-az", *arguments, source, f"{there}/"], check=True)
    copied = {str(path.relative_to(there)) for path in there.rglob("*")}
    assert copied == {
        ".gitignore",
        ".rayignore",
        "module.py",
        "orpo_ray",
        "orpo_ray/module.py",
        "auth_token",
        "ray.pem",
    }


def start(name: str, tmp_path: Path, programs: dict[str, str] | None = None) -> tuple[dict[str, str], str]:
    """Run the start command of a file's workers up to Ray. Returns the environment that Ray would get, and warnings."""
    home, programs_at = tmp_path / "home", tmp_path / "programs"
    programs_at.mkdir()
    (home / "venv" / "bin").mkdir(parents=True)
    (home / "venv" / "bin" / "activate").touch()
    (home / "orpo-ray").symlink_to(ROOT)
    shown = "#!/usr/bin/env bash\nenv -0 >environment\n"
    for program, text in ({"ray": shown} | (programs or {})).items():
        (programs_at / program).write_text(text)
        (programs_at / program).chmod(0o755)
    path = f"{programs_at}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    environment |= {"HOME": str(home), "PATH": path, "RAY_HEAD_IP": "192.0.2.1", "PYTHONPATH": str(tmp_path)}
    commands = [config(name)[f"{kind}_start_ray_commands"][-1] for kind in ("worker", "head")]
    commands = [command.replace("ulimit -n 65536;", "") for command in commands]  # more than a container may allow
    worker, head = (command.partition("ray start")[0] for command in commands)
    assert worker == head
    done = subprocess.run(
        ["bash", "-c", commands[0]], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = (tmp_path / "environment").read_text().rstrip("\0").split("\0")
    return dict(line.split("=", 1) for line in lines), done.stderr


def test_secrets_of_aws_reach_ray_and_a_missing_one_is_said(aws: None, tmp_path: Path) -> None:
    store = boto3.client("secretsmanager", REGION)
    store.create_secret(Name="orpo-ray/wandb", SecretString="key of W&B")
    found, warnings = start("aws", tmp_path)
    assert found["WANDB_API_KEY"] == "key of W&B"
    assert "HF_TOKEN" not in found  # an empty one would be taken for a token
    (warning,) = warnings.splitlines()
    assert warning.startswith("warning: HF_TOKEN is not set on this node: secret orpo-ray/huggingface: ")
    assert "ResourceNotFoundException" in warning
    assert config("aws")["provider"]["region"] == REGION


def test_secrets_of_google_reach_ray_and_a_missing_one_is_said(tmp_path: Path) -> None:
    gcloud = (
        '#!/usr/bin/env bash\n[[ "$*" = *--secret=orpo-ray-wandb ]] && echo key || { echo "NOT_FOUND" >&2; exit 1; }\n'
    )
    found, warnings = start("gcp", tmp_path, {"gcloud": gcloud})
    assert (found["WANDB_API_KEY"], "HF_TOKEN" in found) == ("key", False)
    assert warnings == "warning: HF_TOKEN is not set on this node: secret orpo-ray-huggingface: NOT_FOUND\n"


def test_secrets_of_azure_reach_ray_and_a_missing_one_is_said(tmp_path: Path) -> None:
    """With modules in the place of Azure's, which need Azure."""
    store = "\n".join(
        (
            "from types import SimpleNamespace",
            "class SecretClient:",
            "    def __init__(self, url, credential): assert url == 'https://VAULT.vault.azure.net', url",
            "    def get_secret(self, name): return SimpleNamespace(value={'wandb': 'key'}[name])",
        )
    )
    for name, text in (("identity", "ManagedIdentityCredential = object"), ("keyvault/secrets", store)):
        module = tmp_path / "azure" / f"{name}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text(text)
    found, warnings = start("azure", tmp_path)
    assert (found["WANDB_API_KEY"], "HF_TOKEN" in found) == ("key", False)
    assert warnings == "warning: HF_TOKEN is not set on this node: secret huggingface: KeyError: 'huggingface'\n"


def test_secrets_of_own_machines_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".orpo-ray-secrets").write_text("WANDB_API_KEY=key\n")
    found, _ = start("local", tmp_path)
    assert (found["WANDB_API_KEY"], found["RAY_AUTH_MODE"]) == ("key", "token")
