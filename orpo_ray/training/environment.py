"""`environment.json`: the versions and the hardware that a run began with, for its report."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version

import ray

from orpo_ray.storage.run_folder import ENVIRONMENT_FILE, RunFolder

PACKAGES = ("orpo-ray", "torch", "transformers", "peft", "ray", "deepspeed", "bitsandbytes")


def write_environment(folder: RunFolder) -> None:
    """Write the file of a run that begins or resumes. Ray is running."""
    resources = ray.cluster_resources()
    found = {name: number for name in PACKAGES if (number := _version(name))}
    found |= {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    found |= {"cpus": f"{resources.get('CPU', 0):g}", "gpus": f"{resources.get('GPU', 0):g}"}
    if types := [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]:
        found |= {"accelerators": ", ".join(types)}
    (folder.path / ENVIRONMENT_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    folder.push(ENVIRONMENT_FILE)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
