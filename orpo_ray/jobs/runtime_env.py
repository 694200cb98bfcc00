"""The runtime environment of a job: read from a YAML file, checked, and completed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from ray.runtime_env import RuntimeEnv, RuntimeEnvConfig

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.jobs.secrets import SECRET_FILES, check_text, check_variables, texts

DEFAULT_FILE = Path("cluster/runtime_env.yaml")
NONE = "none"
# `ray job stop` kills what still runs after these seconds. A run saves a checkpoint first.
STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S"
AFTER_SAVE_SECONDS = 60  # from the end of a save to the end of the driver
PACKAGES = ("pip", "uv", "conda", "image_uri", "container")


def read_runtime_env(given: str | None, working_dir: Path, recipe: Recipe) -> dict[str, Any]:
    """Read the runtime environment of a job.

    Args:
        given: path of a YAML file, or `none`; by default, `cluster/runtime_env.yaml` of the working directory, if any.
        working_dir: the folder that is uploaded. The file may name a requirements file relative to it.
        recipe: of the job; its `checkpoint.stop_timeout_s` is how long a stopped job may take.

    Returns:
        What Ray takes as `runtime_env`, with the requirements read, and without `working_dir`.

    Raises:
        UserError: the file cannot be read, Ray does not take it, or it holds a secret.
    """
    default = working_dir / DEFAULT_FILE
    raw: Any = {}
    field = "--runtime-env"
    if given != NONE and (given is not None or default.is_file()):
        path = Path(given) if given is not None else default
        field = str(path)
        raw = _read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError("must be a mapping", field=field, value=type(raw).__name__, fix="see cluster/runtime_env.yaml")
    _check(raw, field)
    with _in_folder(working_dir):
        parsed = _parsed(raw, field)
    for text in texts(parsed):
        check_text(text, field)
    stop = str(int(recipe.checkpoint.stop_timeout_s) + AFTER_SAVE_SECONDS)
    parsed["env_vars"] = {STOP_SECONDS: stop, **(parsed.get("env_vars") or {})}
    parsed["excludes"] = [*(parsed.get("excludes") or []), *SECRET_FILES]
    return parsed


def describe(runtime_env: dict[str, Any]) -> str:
    """Say in a few words what a runtime environment installs."""
    for kind in ("pip", "uv"):
        if kind in runtime_env:
            return f"{len(runtime_env[kind]['packages'])} packages by {kind}"
    return next((kind for kind in PACKAGES if kind in runtime_env), "what the nodes have")


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        fix = f"give the path of a YAML file such as {DEFAULT_FILE}, or `{NONE}`"
        raise UserError(f"cannot be read: {reason}", field="--runtime-env", value=str(path), fix=fix) from None


def _check(raw: dict[str, Any], field: str) -> None:
    _check_names(raw, RuntimeEnv.known_fields, field)
    if isinstance(raw.get("config"), dict):
        _check_names(raw["config"], RuntimeEnvConfig.known_fields, f"{field}: config")
    if "working_dir" in raw:
        raise UserError("is set by --working-dir", field=f"{field}: working_dir", fix="remove this line")
    check_variables(raw.get("env_vars") or {}, f"{field}: env_vars")


def _check_names(given: dict[str, Any], known: set[str], field: str) -> None:
    unknown = sorted(set(map(str, given)) - known)
    if unknown:
        names = ", ".join(sorted(name for name in known if not name.startswith("_")))
        raise UserError("unknown field of a runtime environment", field=f"{field}: {unknown[0]}", fix=f"use {names}")


def _parsed(raw: dict[str, Any], field: str) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = RuntimeEnv(**raw).to_dict()
    except (TypeError, ValueError, OSError) as error:
        fix = "see cluster/runtime_env.yaml; a requirements file is named relative to the working directory"
        raise UserError(f"Ray does not take it: {error}", field=field, fix=fix) from None
    return parsed


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """Read relative paths from a folder, as Ray takes them from the working directory of the process."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
