"""Submit a recipe as a Ray job: check everything that can be checked before the upload, submit, and follow the log."""

from __future__ import annotations

import logging
import os
import socket
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from rich.console import Console
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_fixed

from orpo_ray.config.load import load_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.jobs.cost import ESTIMATED, cost_lines
from orpo_ray.jobs.entrypoint import Entrypoint, entrypoint_of
from orpo_ray.jobs.runtime_env import describe, read_runtime_env
from orpo_ray.jobs.secrets import check_text
from orpo_ray.jobs.working_dir import MIB, check_folder, check_size, list_upload
from orpo_ray.ray_cluster.private import TOKEN_VARIABLES
from orpo_ray.storage.files import is_remote

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
CONNECT_SECONDS = 10.0
# Ray takes jobs some seconds after its start, and may lose a package that it deletes at that moment.
NOT_YET = ("No available agent", "may have prematurely been deleted")
ATTEMPTS, BETWEEN_ATTEMPTS = 6, 5.0  # seconds


class JobNotAccepted(OrpoRayError):
    """The cluster did not take the job."""


@dataclass(frozen=True)
class JobOptions:
    """Options of `orpo-ray submit`."""

    address: str | None = None
    """Address of Ray's dashboard; by default, that in the environment, or this machine."""
    command: str = "train"
    """The command of orpo-ray to run, with its options."""
    working_dir: str = "."
    """Folder to upload. The recipe must be in it."""
    runtime_env: str | None = None
    """YAML file with the runtime environment, or `none`; by default, cluster/runtime_env.yaml of the working
    directory."""
    prices: Sequence[str] = ()
    """Prices of GPUs, as for `orpo-ray plan`."""
    with_cost: bool = True
    """Whether to estimate the cost."""


@dataclass(frozen=True)
class Prepared:
    """A job that was checked."""

    entrypoint: Entrypoint
    runtime_env: dict[str, Any]
    """Ray's runtime environment, with the working directory."""


def submit_job(
    recipe: Path, overrides: Sequence[str], options: JobOptions, console: Console
) -> tuple[JobSubmissionClient, str]:
    """Check a job, say what it costs, and submit it.

    Args:
        recipe: recipe file in the working directory.
        overrides: `FIELD=VALUE` strings.
        options: see there.
        console: where to print.

    Returns:
        The client, and the job's id.

    Raises:
        UserError: the recipe, the working directory, the runtime environment or the address is wrong, the cluster
            refuses the token, or a secret would be stored.
        JobNotAccepted: the cluster does not take the job.
    """
    loaded = load_recipe(recipe, overrides)
    prepared = prepare_job(recipe, overrides, loaded, options, console)
    client = connect(options.address, console)
    command = prepared.entrypoint.command
    if options.with_cost and command in ESTIMATED:
        for line in cost_lines(loaded, options.prices, command):
            _print(console, "cost", line)
    job = _submit(client, prepared)
    _print(console, "job", job)
    return client, job


def prepare_job(
    recipe: Path, overrides: Sequence[str], loaded: Recipe, options: JobOptions, console: Console
) -> Prepared:
    """Check what a job would upload and store, and say it. Raises UserError."""
    folder = Path(options.working_dir)
    check_folder(folder)
    runtime_env = read_runtime_env(options.runtime_env, folder, loaded)
    upload = list_upload(folder, runtime_env["excludes"])
    try:
        name = recipe.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        name = ""
    if name not in upload.sizes:
        raise UserError(
            "the recipe is not among the files that are uploaded",
            field="RECIPE",
            value=str(recipe),
            fix=f"copy it into {folder.resolve()} (--working-dir), where no .gitignore or .rayignore excludes it",
        )
    check_size(upload, folder)
    entrypoint = entrypoint_of(options.command, name, overrides, loaded)
    check_text(entrypoint.line, "command line")
    check_text(recipe.read_text(encoding="utf-8"), str(recipe))
    _print(console, "upload", f"{len(upload.sizes):,} files, {upload.total / MIB:,.1f} MiB of {folder.resolve()}")
    _print(console, "packages", describe(runtime_env))
    _print(console, "storage", _storage(loaded))
    if entrypoint.command == "evaluate":
        _print(console, "driver", _place(entrypoint))
    return Prepared(entrypoint, runtime_env | {"working_dir": str(folder)})


def connect(address: str | None, console: Console) -> JobSubmissionClient:
    """Connect to the dashboard of a cluster.

    Args:
        address: of the dashboard; by default, that in the environment, or this machine.
        console: where to warn of a token that would cross a network in plain text.

    Raises:
        UserError: nothing answers there, or the token is refused.
    """
    field, url = _url(address)
    parts = urlsplit(url)
    is_here = parts.hostname in ("127.0.0.1", "localhost", "::1")
    how = "open a tunnel to the head's dashboard, for example ssh -N -L 8265:127.0.0.1:8265 HEAD (docs/clusters.md)"
    if parts.scheme == "http" and not is_here:
        console.print(
            "[yellow]warning:[/yellow] the job and the token cross the network unencrypted; " + how,
            highlight=False,
            soft_wrap=True,
        )
    logging.getLogger("ray.dashboard").setLevel(logging.ERROR)
    try:
        if not urllib.request.getproxies():  # Ray itself would wait for minutes
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), CONNECT_SECONDS).close()
        # These variables would override the address.
        kept = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
        try:
            return JobSubmissionClient(url)
        finally:
            os.environ.update(kept)
    except AuthenticationError:
        raise UserError(
            "the cluster asks for a token, and none or another one was given",
            field=field,
            value=url,
            fix=f"set RAY_AUTH_MODE=token, and {TOKEN_VARIABLES[1]} to a file with the cluster's token",
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no Ray dashboard answers at this address: {reason}", field=field, value=url, fix=how
        ) from None


def _url(address: str | None) -> tuple[str, str]:
    """Return where an address is from, and the address as a URL. Raises UserError."""
    given = [("--address", address), *((name, os.environ.get(name)) for name in ADDRESS_VARIABLES)]
    field, found = next(((field, value) for field, value in given if value), ("--address", DEFAULT_ADDRESS))
    url = found if "://" in found or field == "RAY_ADDRESS" else f"http://{found}"
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        fix = f"give --address the URL of the dashboard, such as {DEFAULT_ADDRESS}"
        raise UserError("must be the URL of a Ray dashboard", field=field, value=found, fix=fix)
    return field, url


def _submit(client: JobSubmissionClient, prepared: Prepared) -> str:
    attempts = Retrying(
        retry=retry_if_exception(lambda error: any(text in str(error) for text in NOT_YET)),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_fixed(BETWEEN_ATTEMPTS),
        reraise=True,
    )
    try:
        entrypoint = prepared.entrypoint
        job: str = attempts(
            client.submit_job, entrypoint=entrypoint.line, runtime_env=prepared.runtime_env, **entrypoint.resources
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise JobNotAccepted(f"the cluster did not take the job: {' '.join(str(error).split())[:500]}") from None
    return job


def _storage(recipe: Recipe) -> str:
    storage = recipe.checkpoint.storage
    if is_remote(storage):
        return storage
    if not os.path.isabs(storage):
        return f"{storage} in the home folder of the head node; with several nodes, give one that all of them share"
    return f"{storage}, which must be the same folder on all nodes"


def _place(entrypoint: Entrypoint) -> str:
    gpus = entrypoint.resources["entrypoint_num_gpus"]
    if gpus:
        return f"evaluates with {gpus:g} GPU"
    return "evaluates without a GPU; set scaling.gpus_per_worker=1 to use one"


def _print(console: Console, label: str, text: str) -> None:
    console.print(f"{label:9} {text}", highlight=False, soft_wrap=True, markup=False)
