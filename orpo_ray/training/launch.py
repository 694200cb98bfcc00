"""A recipe -> a run on Ray: what to read, whether it fits the cluster, the trainer, and what came of it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from orpo_ray.data.pipeline import least_cpus
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.model.loading import Attention, commit_of, pick_attention
from orpo_ray.recipe import Recipe, parse_recipe, read_mapping
from orpo_ray.results.tracking import METRICS_FILE, last_metrics
from orpo_ray.run_folder import RunFolder
from orpo_ray.storage import is_remote, locate
from orpo_ray.training.checkpoint import FINAL
from orpo_ray.training.data import encoder_of, run_data
from orpo_ray.training.progress import Board, Watch
from orpo_ray.training.worker import WorkerConfig, train_worker

RECIPE_FILE = "recipe.yaml"
DEFAULT_CHECKPOINTS = 10
# May differ between a run's first start and its resumption: they change how it runs, not what it computes.
MAY_CHANGE = ("scaling", "checkpoint", "tracking", "eval", "tune", "model.vision_cache")


class TrainingFailed(OrpoRayError):
    """The run ended with an error that is not the user's input."""


@dataclass(frozen=True)
class RunSummary:
    """What a run left: its folder, the latest value of every metric, whether it had been finished before."""

    run_uri: str
    metrics: dict[str, float]
    was_finished: bool = False


@dataclass(frozen=True)
class Resources:
    """What each worker holds, and how many encoding tasks work for it."""

    cpus: float
    gpus: int
    cpu_threads: int
    max_encoders: int


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it), or start one on this machine.

    Raises UserError where RAY_ADDRESS names no cluster that answers.
    """
    if ray.is_initialized():
        return
    # A new process takes seconds to import what encoding needs: keep idle ones between training and evaluation.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    # Ray lowers the priority of all its workers; here only encoders should yield (see data/pipeline.py).
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A run has some ten small actors; on two cores Ray warns about that many at once.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    address = os.environ.get("RAY_ADDRESS")
    # Worker output goes to Ray's logs; what a user should see comes through the board.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not address:
        # Not address=None: that joins whatever cluster was last started here, and waits minutes for one that has died.
        with own_address():
            ray.init(address="local", **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        fix = "unset it to run on this machine alone, or start a cluster: ray start --head"
        raise UserError(str(error).split("\n")[0], field="RAY_ADDRESS", value=address, fix=fix) from None


@contextlib.contextmanager
def own_address() -> Iterator[None]:
    """Tell the processes of a Ray that is about to start here where it is.

    Those that ask Ray for the state of an actor (Train's cleaner after a stopped trial) look for a cluster on the
    machine otherwise; with an old or a second one there they fail, a stopped trial keeps its CPUs, and a sweep hangs.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    own = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}
    os.environ |= own
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name)


def launch_training(recipe: Recipe, console: Console, callbacks: list[Any] | None = None) -> RunSummary:
    """Run a recipe to its end, resuming what its run folder holds. Raises UserError and TrainingFailed."""
    recipe = recipe.anchored()
    folder = RunFolder(recipe.run_uri)
    saved = _check_run_folder(recipe, folder)
    if saved and folder.has_model(FINAL):
        return RunSummary(folder.uri, last_metrics(folder), was_finished=True)
    recipe = _pinned(recipe, saved)
    read, held_out = run_data(recipe)
    # Loaded here once, so that a wrong model id is one message and not a failed worker.
    attention = pick_attention(recipe.model)
    encoder = encoder_of(recipe)
    encoder.build()
    folder.make()
    start_ray()
    resources = worker_resources(recipe, ray.cluster_resources())
    num_steps = -(-read.last_slot // recipe.optim.pairs_per_step)
    recipe = _resolved(recipe, num_steps)
    (folder.path / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    folder.push(RECIPE_FILE)
    console.print(_headline(recipe, attention, read, held_out, num_steps), highlight=False, soft_wrap=True)
    board = Board.remote()  # type: ignore[attr-defined]
    config = WorkerConfig(
        recipe=recipe.model_dump(mode="json"),
        train=read,
        held_out=held_out,
        encoder=encoder,
        num_steps=num_steps,
        board=board,
        cpu_threads=resources.cpu_threads,
        max_encoders=resources.max_encoders,
    )
    with Watch(board, console):
        _fit(config, recipe, resources, callbacks or [])
    return RunSummary(folder.uri, last_metrics(folder))


def worker_resources(recipe: Recipe, cluster: dict[str, float], runs: int = 1, reserved: float = 0.0) -> Resources:
    """What each worker gets of this cluster. Raises UserError if they cannot all run beside the data's tasks.

    runs: how many runs like this are to fit at a time. reserved: CPUs that something else holds.
    """
    scaling = recipe.scaling
    workers = scaling.num_workers * runs
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    per_worker = int(gpus > 0) if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    if per_worker * workers > gpus:
        raise UserError(
            f"{workers} worker(s) with a GPU each, and the cluster has {gpus:g}",
            field="scaling.num_workers",
            value=scaling.num_workers,
            fix=f"ask for at most {int(gpus)} in all, or set scaling.gpus_per_worker to 0",
        )
    for_data = least_cpus(workers) + reserved
    # Rounded down, so that the shares never add up to more than there is.
    wanted = scaling.cpus_per_worker or min(1.0, math.floor(100 * (cpus - for_data) / workers) / 100)
    if wanted <= 0 or wanted * workers + for_data > cpus:
        raise UserError(
            f"{workers} worker(s) of {max(wanted, 0.01):g} CPU(s) and {for_data:g} for the data exceed the "
            f"cluster's {cpus:g}",
            field="scaling.cpus_per_worker",
            value=scaling.cpus_per_worker,
            fix="lower scaling.cpus_per_worker, scaling.num_workers or tune.max_concurrent, or add nodes",
        )
    return Resources(
        cpus=wanted,
        gpus=per_worker,
        cpu_threads=max(1, (os.cpu_count() or 1) // workers),
        max_encoders=max(1, int((cpus - wanted * workers) / workers)),
    )


def _fit(config: WorkerConfig, recipe: Recipe, resources: Resources, callbacks: list[Any]) -> None:
    per_worker = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"worker": config},
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=recipe.scaling.num_workers, use_gpu=bool(resources.gpus), resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            **storage_of(recipe),
            failure_config=FailureConfig(max_failures=recipe.scaling.max_failures, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=recipe.checkpoint.keep),
            callbacks=callbacks,
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        fatal = ray.get(config.board.fatal.remote())
        if fatal is not None:
            raise fatal from None
        raise TrainingFailed(_first_failure(error)) from error
    fatal = ray.get(config.board.fatal.remote())
    if fatal is not None:
        raise fatal


def storage_of(recipe: Recipe) -> dict[str, Any]:
    """Where Ray Train and Tune write: the options of a RunConfig."""
    above, _, name = recipe.run_uri.rpartition("/")
    if not is_remote(recipe.run_uri):
        return {"name": name, "storage_path": above}
    filesystem, path = locate(above, "checkpoint.storage")
    return {"name": name, "storage_path": path, "storage_filesystem": filesystem}


def _first_failure(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        return f"worker {rank} failed: {type(failure).__name__}: {failure}"
    return str(error)


def _resolved(recipe: Recipe, num_steps: int) -> Recipe:
    """The recipe with what it left open: here, how often to save."""
    raw = recipe.model_dump(mode="json")
    raw["checkpoint"]["every_steps"] = recipe.checkpoint.every_steps or max(1, num_steps // DEFAULT_CHECKPOINTS)
    return parse_recipe(raw)


def _pinned(recipe: Recipe, saved: Recipe | None) -> Recipe:
    """The recipe with its model's revision as a commit, where it comes from the hub: the saved run's, if there is one.

    A branch may have moved on since; a run ends with the weights and the processor that it began with.
    """
    revision = saved.model.revision if saved is not None else commit_of(recipe.model) or recipe.model.revision
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": revision})})


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _check_run_folder(recipe: Recipe, folder: RunFolder) -> Recipe | None:
    """The recipe of the run that the folder holds already; raises UserError if it is another one's."""
    try:
        folder.pull(RECIPE_FILE)
    except OSError as error:
        raise UserError(f"cannot be reached: {error}", field="checkpoint.storage", value=folder.uri) from None
    path = folder.path / RECIPE_FILE
    if not path.exists():
        return None
    # Parsed, so that a key which is newer than the run stands at its default.
    run = parse_recipe(read_mapping(path), source=str(path))
    if _is_commit(run.model.revision) and not _is_commit(recipe.model.revision):
        recipe = _pinned(recipe, run)  # as the run itself was: a branch, a tag or none became a commit
    saved, now = run.model_dump(mode="json"), recipe.model_dump(mode="json")
    differing = [
        f"{section}.{key}"
        for section, value in now.items()
        if isinstance(value, dict) and section not in MAY_CHANGE
        for key in value
        if saved[section][key] != value[key] and f"{section}.{key}" not in MAY_CHANGE
    ]
    if differing and not folder.has(METRICS_FILE):
        return None  # it ended before its first step: nothing is lost
    if differing:
        raise UserError(
            f"this run folder holds a run of another recipe; they differ in {', '.join(differing)}",
            field=folder.uri,
            fix="give the run another name (name=...), or delete the folder",
        )
    return run


def concatenated_because(why: str) -> str:
    """The one line that says why a run does not share prefixes."""
    return f"attention is concatenated, about twice the work of a shared prefix: {why}"


def _headline(recipe: Recipe, attention: Attention, read: ReadSpec, held_out: ReadSpec | None, num_steps: int) -> str:
    held = f", {held_out.last_slot:,} held out" if held_out else ""
    formats = f"{', '.join(sorted(set(read.format_names)))} format"
    revision = f"@{recipe.model.revision[:12]}" if recipe.model.revision else ""
    return (
        f"[bold]{recipe.name}[/bold]  {recipe.model.id}{revision}, {_tuning(recipe)}, "
        f"ZeRO {recipe.deepspeed.zero_stage}, {recipe.scaling.num_workers} worker(s)\n"
        f"{read.order.num_rows:,} pairs ({formats}){held}; {num_steps:,} steps of {recipe.optim.pairs_per_step} "
        f"-> {recipe.run_uri}" + (f"\n{concatenated_because(attention.why)}" if attention.why else "")
    )


def _tuning(recipe: Recipe) -> str:
    """What is trained, in two words or three."""
    lora = recipe.model.lora
    if lora is None:
        return "full fine-tuning"
    kind = "QLoRA" if recipe.model.quantization is not None else "LoRA"
    return f"{kind} r={lora.r}" + (" (DoRA)" if lora.use_dora else "")
