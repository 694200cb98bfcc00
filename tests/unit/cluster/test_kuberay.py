"""What Ray's autoscaler, Kubernetes and the guide make of the files in `cluster/kuberay/`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.air.config import ScalingConfig
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from orpo_ray.config.load import load_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.training.placement import fitting_nodes
from orpo_ray.training.resources import worker_resources
from support.cluster_files import CLUSTER, load
from support.paths import ROOT

KUBERAY = CLUSTER / "kuberay"
(STAYS,) = load(KUBERAY / "raycluster.yaml")
JOBS = [load(KUBERAY / f"rayjob-{name}.yaml")[0] for name in ("train", "tune")]
CLUSTERS = [STAYS["spec"], *(job["spec"]["rayClusterSpec"] for job in JOBS)]
GUIDE = (ROOT / "docs" / "clusters.md").read_text().partition("\n## Kubernetes\n")[2].partition("\n## ")[0]
HEAD_ALONE = [{"Alive": True, "Resources": {"CPU": 0.0}, "Labels": {}}]
KILL_SECONDS = 10  # that Ray has between the end of the notice and the end of the grace period


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)


def asked_for() -> Iterator[Any]:
    """Yield the cluster and the command of each RayJob, and those of the guide for the cluster that stays."""
    for job in JOBS:
        yield pytest.param(job["spec"]["rayClusterSpec"], job["spec"]["entrypoint"], id=job["metadata"]["name"])
    submitted = re.findall(r"^orpo-ray submit (?:.*\\\n)*.*$", "\n".join(blocks()), flags=re.MULTILINE)
    assert submitted
    for command in submitted:
        yield pytest.param(STAYS["spec"], command.replace(" --runtime-env none", ""), id="the guide")


def recipe_of(command: str) -> Recipe:
    program, _, path, *overrides = shlex.split(command.replace("\\\n", " "))
    assert program == "orpo-ray"
    return load_recipe(ROOT / path, overrides)


def autoscaler_on(cluster: dict[str, Any], recipe: Recipe) -> SchedulingReply:
    """Return what Ray's autoscaler does on a cluster without workers when the recipe's workers ask for nodes."""
    resource = {"metadata": {"name": "x", "namespace": "x"}, "spec": cluster}
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(resource), skip_content_hash=True)
    resources = worker_resources(recipe, {"CPU": 0.0})
    bundle = ScalingConfig(
        num_workers=recipe.scaling.min_workers,
        use_gpu=bool(resources.gpus),
        resources_per_worker=resources.per_worker,
        accelerator_type=recipe.scaling.accelerator_type,
    )._resources_per_worker_not_none
    workers = [ResourceRequestUtil.make(bundle) for _ in range(recipe.scaling.min_workers)]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        gang_resource_requests=[GangResourceRequest(requests=workers)],
    )
    return ResourceDemandScheduler().schedule(request)


@pytest.mark.parametrize(("cluster", "command"), list(asked_for()))
def test_a_command_waits_for_the_pool_that_the_autoscaler_starts_for_it(cluster: dict[str, Any], command: str) -> None:
    recipe = recipe_of(command)
    assert {group["minReplicas"] for group in cluster["workerGroupSpecs"]} == {0}
    assert recipe.scaling.nodes_timeout_s > 0
    assert fitting_nodes(recipe.scaling, HEAD_ALONE) == []  # waits; it is refused if it does not
    reply = autoscaler_on(cluster, recipe)
    assert not reply.infeasible_gang_resource_requests
    started = {request.instance_type: request.count for request in reply.to_launch}
    workers = {name: count for name, count in started.items() if name != "headgroup"}
    assert sum(workers.values()) == recipe.scaling.min_workers
    assert set(workers) <= {"gpu-l4", "gpu-l4-spot"}


@pytest.mark.parametrize("cluster", CLUSTERS, ids=["stays", "train", "tune"])
def test_a_gpu_pool_says_which_gpu_it_has(cluster: dict[str, Any]) -> None:
    resource = {"metadata": {"name": "x", "namespace": "x"}, "spec": cluster}
    kinds = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    found = {name: kind["resources"] for name, kind in kinds.items()}
    accelerators = {name: [each for each in has if each.startswith("accelerator_type:")] for name, has in found.items()}
    assert accelerators == {
        "headgroup": [], "cpu": [], "gpu-l4": ["accelerator_type:L4"], "gpu-l4-spot": ["accelerator_type:L4"],
    }  # fmt: skip
    assert (found["gpu-l4"]["CPU"], found["gpu-l4"]["GPU"]) == (12, 1)


@pytest.mark.parametrize("cluster", CLUSTERS, ids=["stays", "train", "tune"])
def test_the_notice_of_a_worker_pod_ends_before_its_grace_period(cluster: dict[str, Any]) -> None:
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        variables = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
        notice = int(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert notice == pod["terminationGracePeriodSeconds"] - KILL_SECONDS


def test_pods_on_spot_nodes_go_first_and_heads_last() -> None:
    values = {each["metadata"]["name"]: each["value"] for each in load(KUBERAY / "base" / "priority.yaml")}
    for cluster in CLUSTERS:
        head = cluster["headGroupSpec"]["template"]["spec"]["priorityClassName"]
        groups = [(group["labels"]["ray.io/market-type"], group["template"]["spec"]["priorityClassName"])
                  for group in cluster["workerGroupSpecs"]]  # fmt: skip
        spot = {values[name] for market, name in groups if market == "spot"}
        on_demand = {values[name] for market, name in groups if market == "on-demand"}
        assert spot
        assert max(spot) < min(on_demand) <= max(on_demand) < values[head]


def test_a_run_on_a_cluster_of_its_own_needs_the_base_alone() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    built = subprocess.run(
        ["kubectl", "kustomize", KUBERAY / "base"], capture_output=True, text=True, check=True
    ).stdout
    there = {(each["kind"], each["metadata"]["name"]) for each in yaml.safe_load_all(built)}
    assert not {kind for kind, _ in there} & {"RayCluster", "StatefulSet"}
    for job in JOBS:
        cluster = job["spec"]["rayClusterSpec"]
        assert ("Namespace", job["metadata"]["namespace"]) in there
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            assert ("PriorityClass", pod["priorityClassName"]) in there
            claims = [each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"]
                      if "persistentVolumeClaim" in each]  # fmt: skip
            assert {("PersistentVolumeClaim", name) for name in claims} <= there


def test_only_the_operator_of_its_own_namespace_reaches_ray_from_outside() -> None:
    (policy,) = load(KUBERAY / "base" / "network-policy.yaml")
    sources = [source for rule in policy["spec"]["ingress"] for source in rule["from"]]
    others = [source["namespaceSelector"] for source in sources if "namespaceSelector" in source]
    (namespace,) = re.findall(r"^helm install .*--namespace (\S+)", GUIDE.replace("\\\n", " "), flags=re.MULTILINE)
    assert others == [{"matchLabels": {"kubernetes.io/metadata.name": namespace}}]


STUBS = """
kubectl() {
  echo "kubectl $*" >>commands
  case "$*" in
    *from-env-file=/dev/stdin*) cat >secrets ;;
    *"get secret"*) printf %s dG9rZW4= ;;
  esac
}
docker() { echo "docker $*" >>commands; }
helm() { echo "helm $*" >>commands; }
orpo-ray() { echo "orpo-ray $* with $RAY_AUTH_TOKEN" >>commands; }
"""


def test_the_commands_of_the_guide_run_one_after_the_other_when_pasted(tmp_path: Path) -> None:
    """A shell that reads them from its own input, as a terminal does."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-s"],
        input=STUBS + "\n".join(blocks()) + "wait\n",
        env={"PATH": os.environ["PATH"], "WANDB_API_KEY": "key", "OTHER": "no"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "commands").read_text().splitlines()
    found = [
        next(index for index, command in enumerate(commands) if re.search(pattern, command))
        for pattern in (
            r"helm install", r"docker build", r"docker push", r"apply -k cluster/kuberay/base", r"generic run-secrets",
            r"generic redis", r"apply -k cluster/kuberay$", r" wait ", r"port-forward",
            r"orpo-ray submit .* with token", r"create -f cluster/kuberay/rayjob-train\.yaml",
        )
    ]  # fmt: skip
    assert found == sorted(found)
    assert (tmp_path / "secrets").read_text() == "WANDB_API_KEY=key\n"
