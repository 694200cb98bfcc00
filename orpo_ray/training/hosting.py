"""Train runs of one worker in this process: open their folders, then train them side by side on one model, or one run
by the training program of a worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.balance import Packing, StepShare
from orpo_ray.data.from_recipe import encoder_of
from orpo_ray.errors import OrpoRayError
from orpo_ray.evaluation.evaluator import HeldOut
from orpo_ray.model.base_models import BaseModels
from orpo_ray.model.memory import free_memory
from orpo_ray.streaming.steps import iter_shares, open_feed
from orpo_ray.training.hosted_runs import HostedRuns
from orpo_ray.training.open_runs import OpenRun, OpenRuns
from orpo_ray.training.packed_runs import Listener, PackedData, PackedRuns
from orpo_ray.training.resources import threads_of_worker
from orpo_ray.training.sharded_loading import load_pair_model
from orpo_ray.training.worker import Worker
from orpo_ray.training.worker_context import WorkerContext
from orpo_ray.training.worker_start import WorkerConfig, full_disk


def train_hosted(hosted: HostedRuns, listener: Listener, bases: BaseModels) -> None:
    """Train runs to their ends, or resume them. An error of one run ends that run only.

    Runs that the listener asks to stop are left alone.

    Args:
        hosted: the runs; several train side by side.
        listener: hears of every run, and of the end of each.
        bases: keeps base models between calls.

    Raises:
        Exception: what may not come again, such as a lost task of the data. The runs that have not ended can be called
            for once more.
    """
    if device_of(hosted).type == "cpu":
        scaling = parse_recipe(next(iter(hosted.recipes.values()))).scaling
        torch.set_num_threads(threads_of_worker(scaling, hosted.resources.cpu_threads))
    with OpenRuns(hosted, listener) as runs:
        for together in runs.by_step():
            try:
                with _process_group_of_one():
                    _train(together, hosted, runs, bases)
            except OrpoRayError as error:
                runs.end(together, error)
            except OSError as error:
                if (full := full_disk(error)) is None:  # it may not come again
                    raise
                runs.end(together, full)
            free_memory()


def device_of(hosted: HostedRuns) -> torch.device:
    """Return where the runs of this process train."""
    return torch.device("cuda", 0) if hosted.resources.gpus else torch.device("cpu")


def _train(together: Mapping[str, OpenRun], hosted: HostedRuns, runs: OpenRuns, bases: BaseModels) -> None:
    if len(together) > 1:
        _train_side_by_side(together, hosted, runs, bases)
        return
    for name, opened in together.items():
        _train_alone(name, opened, hosted, runs, bases)


def _train_side_by_side(
    together: Mapping[str, OpenRun], hosted: HostedRuns, listener: Listener, bases: BaseModels
) -> None:
    recipes = {name: found.recipe for name, found in together.items()}
    first = next(iter(recipes.values()))
    spec, max_encoders = encoder_of(first), hosted.resources.max_encoders
    encoder = spec.build()

    def shares(first_step: int, packing: Packing) -> Iterator[StepShare]:
        rows = hosted.train.of_run(first.run_uri)
        read = replace(rows, first_sample=first_step * first.optim.pairs_per_step)
        feed = open_feed(read, spec, max_encoders)
        return iter_shares(feed, packing, first_step, hosted.num_steps)

    def held_out(exchange_images: bool, packing: Packing) -> Iterable[StepShare]:
        return HeldOut(hosted.held_out, spec, max_encoders).shares(exchange_images, packing)

    data = PackedData(hosted.train, shares, held_out, hosted.held_out.digest, encoder, hosted.num_steps)
    model = load_pair_model(first, encoder.processor, device_of(hosted), bases)
    checkpoints = {name: found.checkpoint for name, found in together.items()}
    PackedRuns(recipes, checkpoints, model, data, listener, ray.get_runtime_context().get_node_id()).run()


class _Left(Exception):
    """A run was asked to leave: without another checkpoint, and also if its folder is another process's by now."""


@dataclass(frozen=True)
class _ListenerLine:
    """The `Line` of a run's only worker, which is in the listener's process."""

    name: str
    listener: Listener

    def update(self, **state: Any) -> None:
        self.listener.tell(self.name, **state)

    def warn(self, text: str) -> None:
        self.listener.warn(self.name, text)

    def asks_to_stop(self) -> bool:
        if self.listener.asks_to_stop(self.name):
            raise _Left
        return False


def _train_alone(name: str, opened: OpenRun, hosted: HostedRuns, listener: Listener, bases: BaseModels) -> None:
    recipe, resources = opened.recipe, hosted.resources
    config = WorkerConfig(
        recipe=recipe.model_dump(mode="json"),
        train=hosted.train.of_run(recipe.run_uri),
        held_out=hosted.held_out,
        encoder=encoder_of(recipe),
        num_steps=hosted.num_steps,
        cpus=resources.cpus,
        cpu_threads=resources.cpu_threads,
        max_encoders=resources.max_encoders,
    )
    context = WorkerContext(
        rank=0,
        num_workers=1,
        workers_of_node=1,
        device=device_of(hosted),
        node=ray.get_runtime_context().get_node_id(),
        line=_ListenerLine(name, listener),
        report=partial(listener.report, name),
        watches_nodes=False,
        goes_on=True,
        bases=bases,
    )
    feed = open_feed(config.train, config.encoder, config.max_encoders) if opened.checkpoint is None else None
    worker = Worker(config, opened.checkpoint, feed, context)
    try:
        worker.run()
    except _Left:
        pass
    except Exception as error:
        if not isinstance(error, OrpoRayError) and worker.is_worth_saving:  # the run may be called for once more
            with contextlib.suppress(RuntimeError):  # of a device that has failed
                worker.save_alone()
        raise
    finally:
        with contextlib.suppress(OrpoRayError, OSError):
            worker.tracker.close()  # the process goes on, with other runs
    listener.ended(name, None)


@contextlib.contextmanager
def _process_group_of_one() -> Iterator[None]:
    """Collectives of the training program, which has one process here."""
    from torch._C._distributed_c10d import HashStore

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
