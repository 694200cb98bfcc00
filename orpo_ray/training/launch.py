"""Launch a recipe's run on Ray: list the data, check the model and the cluster, train, and collect the result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.from_recipe import RunRows, encoder_of, run_data
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.files import is_remote, locate
from orpo_ray.storage.lease import Lease
from orpo_ray.storage.run_folder import FINAL, RunFolder
from orpo_ray.tracking.metrics_file import last_metrics
from orpo_ray.training.checkpoint_choice import FROM_CHECKPOINT, choose_by_hand, forget_ray_snapshot
from orpo_ray.training.elastic import StayingNodesPolicy
from orpo_ray.training.model_check import start_model_check
from orpo_ray.training.placement import NodesWait, TellPlaced, fitting_nodes, waiting_variables
from orpo_ray.training.process_group import SharedDevices
from orpo_ray.training.progress import STARTING, ProgressDisplay
from orpo_ray.training.reservation import give_back, remove_groups
from orpo_ray.training.resources import Resources, too_many_workers, worker_resources
from orpo_ray.training.run_identity import check_run_folder
from orpo_ray.training.run_opening import open_run, with_saves
from orpo_ray.training.run_status import start_status
from orpo_ray.training.stopping import RunStopped, StopSignals
from orpo_ray.training.teardown import SaveBeforeTeardown
from orpo_ray.training.worker_start import WorkerConfig, train_worker

START_FAILURES = 3
"""Failed starts of workers, of a minute each, after which a run ends."""
ELASTIC_START_FAILURES = 30
"""The same for a number of workers that changes. One fails whenever a node is lost while workers start."""
TRIAL_START_FAILURES = 120
"""The same for a trial: the trials of another sweep may hold the cluster for as long as they take."""
END_SECONDS = 10.0
"""How long to wait for the end of a controller that was killed."""


class TrainingFailed(OrpoRayError):
    """The run ended with an error that is not caused by the user's input."""


@dataclass(frozen=True)
class RunSummary:
    """Result of a run."""

    run_uri: str
    metrics: dict[str, float]
    """The latest value of every metric."""
    was_finished: bool = False
    """Whether the run was finished before, so that nothing was done."""


class _RunTrainer(DataParallelTrainer):
    """Ray Train's trainer without the actors that a run has no use for; each takes seconds of every start.

    Ray Data hands no dataset to the workers, which read for themselves. What a dead controller leaves is freed with
    its driver, except for the trials of a sweep, where one is stopped and the driver goes on.
    """

    def __init__(self, *arguments: Any, is_trial: bool, together: int, **options: Any) -> None:
        self._together = together
        self._controller: Any = None
        self._without = {DatasetsCallback} if is_trial else {DatasetsCallback, PlacementGroupCleanerCallback}
        super().__init__(*arguments, **options)

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if type(callback) not in self._without]

    def _initialize_and_run_controller(self, **options: Any) -> ray.train.Result:
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = StayingNodesPolicy(self.scaling_config, self._together)
        return super()._initialize_and_run_controller(**options)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave signals to `StopSignals`; Ray Train's own handler ends a run without a checkpoint."""
        self._controller = controller

    def end(self) -> None:
        """End the controller, its workers and its placement group, which would otherwise go on in a notebook."""
        if self._controller is None:
            return
        ray.kill(self._controller)
        ray.wait([self._controller.get_state.remote()], timeout=END_SECONDS)  # its death, as an error
        remove_groups(self._controller)


def launch_training(
    recipe: Recipe,
    console: Console,
    callbacks: list[Any] | None = None,
    from_checkpoint: str | None = None,
    data: RunRows | None = None,
    together: int = 1,
) -> RunSummary:
    """Train a recipe to its end. If its run folder holds a whole checkpoint, resume from the newest.

    Args:
        recipe: the recipe.
        console: where to print.
        callbacks: callbacks for Ray Train.
        from_checkpoint: name, path or URI of the checkpoint to resume from instead; newer ones are deleted.
        data: what `run_data` returns for the recipe, if it is known already.
        together: number of such runs that share the cluster.

    Raises:
        UserError: the recipe, its data, model or cluster do not work, or another run writes to the run folder.
        LeaseLost: another run took over the run folder.
        RunStopped: SIGINT or SIGTERM ended the run.
        TrainingDiverged: the run's loss, gradient or weights are not finite any longer.
        TrainingFailed: the run ended with another error.
    """
    recipe = recipe.with_absolute_paths()
    folder = RunFolder(recipe.run_uri)
    saved = check_run_folder(recipe, folder)
    if saved and folder.has_model(FINAL):
        return _finished(folder, from_checkpoint)
    read, held_out = data or run_data(recipe)
    folder.make()
    resources = _divide_cluster(recipe, folder, console, together)
    status = start_status()
    display = ProgressDisplay(status, console)
    checked = start_model_check(recipe, saved)
    num_steps = -(-read.end_sample // recipe.optim.pairs_per_step)

    def begin() -> None:
        pinned, without_sharing = _checked(checked)
        resolved = with_saves(pinned, num_steps)
        open_run(resolved, read, folder, is_new=saved is None)
        console.print(_headline(resolved, without_sharing, read, held_out, num_steps), highlight=False, soft_wrap=True)
        config = WorkerConfig(
            recipe=resolved.model_dump(mode="json"),
            train=read.of_run(recipe.run_uri),
            held_out=held_out,
            encoder=encoder_of(resolved),
            num_steps=num_steps,
            cpus=resources.cpus,
            cpu_threads=resources.cpu_threads,
            max_encoders=resources.max_encoders,
        )
        display.config = ray.put(config)
        ray.get([status.begin.remote([display.config]), status.update.remote(phase=STARTING)])

    stop = StopSignals(status.request_stop.remote, recipe.checkpoint.stop_timeout_s)
    lease = Lease(folder, on_lost=stop.abort, wait=console.print)
    try:
        with stop, lease:
            if from_checkpoint is not None:
                choose_by_hand(folder, from_checkpoint)
            forget_ray_snapshot(folder)
            # The model is checked while Ray Train starts the workers: each of the two is mostly imports, for seconds.
            with ThreadPoolExecutor(1) as pool, display:
                begun = pool.submit(_or_fail, begin, status)
                try:
                    wait = NodesWait(recipe.scaling, resources.per_worker, status, stop.abort, _warning(console))
                    # A trial runs where no signal can be handled; Ray Train's own limit ends it.
                    with contextlib.nullcontext() if callbacks else wait:
                        _fit(status, recipe, resources, callbacks or [], lease)
                finally:
                    begun.result()  # its own error says more than that of the workers
        if stop.received is not None and not folder.has_model(FINAL):
            raise RunStopped(stop.received, ray.get(status.state.remote()).get("saved_at"))
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(status)  # Ray starts it again whenever it ends otherwise
    return RunSummary(folder.uri, last_metrics(folder))


def _finished(folder: RunFolder, from_checkpoint: str | None) -> RunSummary:
    if from_checkpoint is not None:
        raise UserError(
            f"the run is finished; {folder.uri}/{FINAL} holds its model",
            field=FROM_CHECKPOINT,
            value=from_checkpoint,
            fix=f"delete {FINAL}/ to train again from that checkpoint",
        )
    return RunSummary(folder.uri, last_metrics(folder), was_finished=True)


def _warning(console: Console) -> Callable[[str], None]:
    """Return what prints a warning."""
    return lambda text: console.print(f"[yellow]warning:[/yellow] {text}", highlight=False, soft_wrap=True)


def _divide_cluster(recipe: Recipe, folder: RunFolder, console: Console, together: int) -> Resources:
    """Start or join Ray, and divide its cluster among the workers and the data."""
    try:
        start_ray()
    except OrpoRayError:
        folder.drop_if_empty()
        raise
    nodes = fitting_nodes(recipe.scaling, ray.nodes())
    resources = worker_resources(recipe, ray.cluster_resources(), runs=together, nodes=nodes)
    if (crowd := too_many_workers(recipe, ray.cluster_resources())) is not None:
        _warning(console)(crowd)
    return resources


def _checked(check: ray.ObjectRef) -> tuple[Recipe, str | None]:
    """Wait for the check of the model; return what it returns. Raises UserError."""
    try:
        found: tuple[Recipe, str | None] = ray.get(check)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return found


def _or_fail(prepare: Callable[[], None], status: Any) -> None:
    """Run what the workers wait for; if that fails, end them."""
    try:
        prepare()
    except BaseException as error:  # also SystemExit, which rich raises where nobody reads the output any longer
        # As text, since not every exception can be pickled.
        ray.get(status.fail.remote(TrainingFailed(f"the run was not prepared: {type(error).__name__}: {error}")))
        raise


def _fit(status: Any, recipe: Recipe, resources: Resources, callbacks: list[Any], lease: Lease) -> None:
    os.environ.update(waiting_variables(recipe.scaling))  # Ray Train reads them here, and gives them to its controller
    count = recipe.scaling.num_workers
    start_failures = START_FAILURES if isinstance(count, int) else ELASTIC_START_FAILURES
    trainer = _RunTrainer(
        train_worker,
        is_trial=bool(callbacks),
        together=recipe.scaling.sequence_parallel,
        train_loop_config={"status": status},
        backend_config=SharedDevices(),
        scaling_config=ScalingConfig(
            num_workers=count if isinstance(count, int) else tuple(count),
            use_gpu=bool(resources.gpus),
            resources_per_worker=resources.per_worker,
            accelerator_type=recipe.scaling.accelerator_type,
            label_selector=recipe.scaling.labels or None,
            elastic_resize_monitor_interval_s=recipe.scaling.resize_interval_s,
        ),
        run_config=RunConfig(
            **storage_of(recipe),
            failure_config=FailureConfig(
                max_failures=recipe.scaling.max_failures,
                max_preemption_failures=-1
                if recipe.scaling.max_preemptions is None
                else recipe.scaling.max_preemptions,
                controller_failure_limit=TRIAL_START_FAILURES if callbacks else start_failures,
            ),
            callbacks=[*callbacks, SaveBeforeTeardown(status, recipe.checkpoint.stop_timeout_s), TellPlaced(status)],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    # So that a successor knows what Ray keeps for this run. The context is frozen, and makes its own id.
    object.__setattr__(trainer.train_run_context, "run_id", lease.id)
    if lease.dead is not None:
        give_back(lease.dead.id, recipe.run_uri)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        fatal = ray.get(status.fatal.remote())
        if fatal is not None:
            raise fatal from None
        raise TrainingFailed(_first_failure(error)) from error
    except ray.exceptions.RayError as error:
        raise TrainingFailed(
            f"Ray Train's controller was lost: {str(error).splitlines()[0]}\n"
            "  fix: run the same command again, which resumes from the latest checkpoint"
        ) from error
    except BaseException:  # a signal or a lost lease ended the wait
        trainer.end()
        raise
    finally:
        give_back(lease.id, recipe.run_uri)
    fatal = ray.get(status.fatal.remote())
    if fatal is not None:
        raise fatal


def storage_of(recipe: Recipe) -> dict[str, Any]:
    """Return the options of a RunConfig that say where Ray Train and Ray Tune write."""
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


def _headline(
    recipe: Recipe, without_sharing: str | None, read: ReadSpec, held_out: ReadSpec | None, num_steps: int
) -> str:
    held = f", {held_out.end_sample:,} held out" if held_out else ""
    formats = f"{', '.join(sorted(set(read.format_names)))} format"
    revision = f"@{recipe.model.revision[:12]}" if recipe.model.revision else ""
    return (
        f"[bold]{recipe.name}[/bold]  {recipe.model.id}{revision}, {_tuning(recipe)}, {recipe.objective.title}, "
        f"ZeRO {recipe.deepspeed.zero_stage}, {recipe.scaling.workers_text}\n"
        f"{read.order.num_rows:,} {recipe.samples} ({formats}){held}; "
        f"{num_steps:,} steps of {recipe.optim.pairs_per_step} "
        f"-> {recipe.run_uri}" + (f"\n{without_sharing}" if without_sharing else "")
    )


def _tuning(recipe: Recipe) -> str:
    """Name the kind of tuning."""
    lora = recipe.model.lora
    if lora is None:
        return "full fine-tuning"
    kind = "QLoRA" if recipe.model.quantization is not None else "LoRA"
    return f"{kind} r={lora.r}" + (" (DoRA)" if lora.use_dora else "")
