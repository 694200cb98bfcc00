"""Train the runs of a pack in this process: open their folders, load their model once, and train them side by side."""

from __future__ import annotations

import contextlib
import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.balance import Packing, StepShare
from orpo_ray.data.from_recipe import encoder_of
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import OrpoRayError
from orpo_ray.evaluation.evaluator import HeldOut
from orpo_ray.storage.lease import Lease, LeaseLost
from orpo_ray.storage.run_folder import FINAL, RunFolder
from orpo_ray.storage.scratch import clear_dead_scratch
from orpo_ray.streaming.steps import iter_shares, open_feed
from orpo_ray.tracking.metrics_file import last_metrics
from orpo_ray.training.checkpoint_choice import choose_newest, clean, clear_saving, inspect
from orpo_ray.training.model_check import check_model
from orpo_ray.training.packed_runs import Listener, PackedData, PackedRuns
from orpo_ray.training.run_identity import check_run_folder
from orpo_ray.training.run_opening import open_run, with_saves
from orpo_ray.training.sharded_loading import load_pair_model


@dataclass(frozen=True)
class PackConfig:
    """What the runs of a pack are given."""

    recipes: dict[str, dict[str, Any]]
    """Of each run, as mappings, with absolute paths."""
    train: ReadSpec
    held_out: ReadSpec
    num_steps: int
    """Optimizer steps of each run."""
    cpu_threads: int
    """Threads of a process that trains on CPUs."""
    max_encoders: int
    """Encoding tasks at a time."""
    uses_gpu: bool


@dataclass(frozen=True)
class _Opened:
    recipe: Recipe
    checkpoint: str | None
    """Name of the checkpoint to resume from."""
    step: int
    lease: Lease


def train_pack(config: PackConfig, device: torch.device, listener: Listener) -> None:
    """Train the runs of a pack to their ends, or resume them. An error of one run ends that run only.

    Runs that the listener asks to stop are left alone.

    Args:
        config: of the pack.
        device: where to train.
        listener: hears of every run, and of the end of each.

    Raises:
        Exception: what may not come again, such as a lost task of the data. The runs that have not ended can be called
            for once more.
    """
    if device.type == "cpu":
        torch.set_num_threads(config.cpu_threads)
    clear_dead_scratch()
    with _OpenRuns(config, listener) as runs:
        for together in runs.by_step():
            try:
                with _process_group_of_one():
                    _train(together, config, device, runs)
            except OrpoRayError as error:  # others may not come again
                for name in set(together) & set(runs.opened):
                    runs.ended(name, error)
            free_memory()


def free_memory() -> None:
    """Free the model of runs that have ended: its adapted layers and their stack refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _OpenRuns:
    """The runs whose folders are open. A listener that closes the folder of a run when the run ends."""

    def __init__(self, config: PackConfig, listener: Listener) -> None:
        self._listener = listener
        self._lost: dict[str, LeaseLost] = {}
        self.tell, self.report = listener.tell, listener.report
        self.opened: dict[str, _Opened] = {}
        for name, raw in config.recipes.items():
            if listener.asks_to_stop(name):
                continue
            try:
                found = self._open(name, parse_recipe(raw), config)
            except (OrpoRayError, OSError) as error:
                listener.ended(name, error)
            else:
                if found is not None:
                    self.opened[name] = found

    def warn(self, name: str, text: str) -> None:
        self._listener.warn(name, text)

    def asks_to_stop(self, name: str) -> bool:
        return name in self._lost or self._listener.asks_to_stop(name)

    def ended(self, name: str, error: Exception | None) -> None:
        with contextlib.suppress(OSError):
            self.opened.pop(name).lease.__exit__(None, None, None)
        self._listener.ended(name, error or self._lost.get(name))

    def __enter__(self) -> _OpenRuns:
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self.opened):
            with contextlib.suppress(OSError):
                self.opened.pop(name).lease.__exit__(None, None, None)

    def by_step(self) -> list[dict[str, _Opened]]:
        """Return the runs that can train side by side, the furthest first: at the same step, of the same model."""
        groups: dict[tuple[int, str], dict[str, _Opened]] = defaultdict(dict)
        for name, found in self.opened.items():
            groups[found.step, found.recipe.model.revision or ""][name] = found
        return [groups[place] for place in sorted(groups, reverse=True)]

    def _open(self, name: str, recipe: Recipe, config: PackConfig) -> _Opened | None:
        """Take the folder of a run; None if the run was finished before. Raises UserError and OSError."""
        folder = RunFolder(recipe.run_uri)
        saved = check_run_folder(recipe, folder)
        if saved and folder.has_model(FINAL):
            self.report(name, last_metrics(folder) | {"final": True})
            self._listener.ended(name, None)
            return None
        folder.make()
        lease = Lease(folder, on_lost=lambda lost: self._lost.update({name: lost}))
        lease.__enter__()
        try:
            pinned, _ = check_model(recipe, saved)
            recipe = with_saves(pinned, config.num_steps)
            open_run(recipe, config.train, folder, is_new=saved is None)
            clear_saving(folder)
            checkpoint = choose_newest(folder, lambda text: self.warn(name, text))
            if checkpoint is not None:
                clean(folder, checkpoint, recipe.checkpoint.keep)
            step = 0 if checkpoint is None else inspect(folder, checkpoint).step or 0
        except BaseException:
            lease.__exit__(None, None, None)
            raise
        return _Opened(recipe, checkpoint, step, lease)


def _train(together: Mapping[str, _Opened], config: PackConfig, device: torch.device, listener: Listener) -> None:
    recipes = {name: found.recipe for name, found in together.items()}
    first = next(iter(recipes.values()))
    spec = encoder_of(first)
    encoder = spec.build()

    def shares(first_step: int, packing: Packing) -> Iterator[StepShare]:
        read = replace(config.train, first_sample=first_step * first.optim.pairs_per_step)
        feed = open_feed(read, spec, config.max_encoders)
        return iter_shares(feed, packing, first_step, config.num_steps)

    def held_out(exchange_images: bool, packing: Packing) -> Iterable[StepShare]:
        return HeldOut(config.held_out, spec, config.max_encoders).shares(exchange_images, packing)

    data = PackedData(config.train, shares, held_out, config.held_out.digest, encoder, config.num_steps)
    model = load_pair_model(first, encoder.processor, device)
    checkpoints = {name: found.checkpoint for name, found in together.items()}
    PackedRuns(recipes, checkpoints, model, data, listener, ray.get_runtime_context().get_node_id()).run()


@contextlib.contextmanager
def _process_group_of_one() -> Iterator[None]:
    """Collectives of the training program, which has one process here."""
    from torch._C._distributed_c10d import HashStore

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
