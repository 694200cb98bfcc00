"""Check the files in `cluster/` against the schemas of what reads them. Each function returns what is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import kubernetes_validate
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private import _azure
from ray.autoscaler._private.util import prepare_config, validate_config

from support.paths import ROOT, SHARED, TESTS

CLUSTER = ROOT / "cluster"
SCHEMAS = TESTS / "schemas"
KUBERNETES_VERSION = "1.32"


def load(path: Path) -> list[Any]:
    """Return the documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def launcher_problems(config: dict[str, Any]) -> list[str]:
    """Check a file of Ray's cluster launcher as `ray up` does, and the machines that it asks a cloud for."""
    problems = []
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (jsonschema.ValidationError, ValueError, KeyError) as error:
        problems.append(str(getattr(error, "message", error)))
    check = {"aws": _ec2_problems, "gcp": _gce_problems, "azure": _azure_problems}.get(config["provider"]["type"])
    for name, kind in config.get("available_node_types", {}).items():
        problems += [f"{name}: {problem}" for problem in (check(kind["node_config"]) if check else ())]
    return problems


def kubernetes_problems(manifest: dict[str, Any]) -> list[str]:
    """Check a manifest: those of KubeRay by its definitions, and all pods in it as Kubernetes' own."""
    if manifest["apiVersion"] != "ray.io/v1":
        return _core_problems(manifest)
    schema = json.loads((SCHEMAS / "kuberay.json").read_text())[manifest["kind"]]
    problems = _schema_problems(_strict(schema), manifest)
    for template in _templates(manifest["spec"]):
        problems += _core_problems(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        )
    return problems


def kuberay_definition(kind: str) -> dict[str, Any] | None:
    """Return KubeRay's whole definition, pod templates included, if it is beside the checkout."""
    path = SHARED / "kuberay" / f"crd_{kind.lower()}s.yaml"
    if not path.is_file():
        return None
    versions = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
    return _strict(schema)


def skypilot_problems(task: dict[str, Any]) -> list[str]:
    """Check a task of SkyPilot."""
    return _schema_problems(json.loads((SCHEMAS / "skypilot_task.json").read_text()), task)


def _core_problems(manifest: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _schema_problems(schema: dict[str, Any], value: Any) -> list[str]:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def _strict(schema: Any) -> Any:
    """Forbid unknown fields, as Kubernetes drops them in silence, and read its number-or-text fields."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(strict.get("properties"), dict) and "additionalProperties" not in strict:
        if strict["properties"].get("metadata") == {"type": "object"}:  # the definition leaves it to Kubernetes
            strict["properties"]["metadata"] = {"type": "object"}
        strict["additionalProperties"] = False
    return strict


def _templates(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key in ("template", "submitterPodTemplate"):
                yield each
            else:
                yield from _templates(each)
    elif isinstance(value, list):
        for each in value:
            yield from _templates(each)


@cache
def _run_instances() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _ec2_problems(node: dict[str, Any]) -> list[str]:
    request = {"MinCount": 1, "MaxCount": 1, **node}
    report = ParamValidator().validate(request, _run_instances())
    return report.generate_report().splitlines() if report.has_errors() else []


def _gce_problems(node: dict[str, Any]) -> list[str]:
    return _schema_problems(json.loads((SCHEMAS / "gcp_instance.json").read_text()), node)


def _azure_problems(node: dict[str, Any]) -> list[str]:
    template = json.loads((Path(_azure.__path__[0]) / "azure-vm-template.json").read_text())
    unknown = set(node) - {"azure_arm_parameters"}
    unknown |= set(node["azure_arm_parameters"]) - set(template["parameters"]) - {"availability_zone"}
    return [f"unknown parameter {name}" for name in sorted(unknown)]
