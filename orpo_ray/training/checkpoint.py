"""The data position that a checkpoint holds, loading a checkpoint, and saving the final model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pickle import PickleError
from typing import Any

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import UserError
from orpo_ray.model.adapter_folder import save_adapter
from orpo_ray.model.loading import is_adapted
from orpo_ray.model.lora import FIRST_ADAPTER
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.processing.processor import load_processor
from orpo_ray.storage.files import one_line
from orpo_ray.storage.run_folder import FINAL, RunFolder
from orpo_ray.training.checkpoint_choice import checkpoint_names
from orpo_ray.training.divergence import FIX, TrainingDiverged
from orpo_ray.training.engine import Engine, LoadsPart
from orpo_ray.training.fetching import all_files, fetched
from orpo_ray.training.manifest import Damage, read_checked
from orpo_ray.training.unlogged import LOG_FILE, LogLine, read_log

POSITION_FILE = "position.json"
_OF_LOST_WORKERS = re.compile(r"gloo|NCCL|[Cc]onnection|[Tt]imed? ?out")


@dataclass(frozen=True)
class Position:
    """Position of a run in its data, and properties that a resumed run must have in common with it."""

    step: int = 0
    """Steps done: all sample indices below step * pairs_per_step are consumed."""
    bad: int = 0
    """Bad rows so far."""
    seen: int = 0
    """Rows so far, bad ones included."""
    num_rows: int = 0
    """Rows of the training data, which the order depends on."""
    data: str = ""
    """Digest of the training data."""
    num_workers: int = 1
    """Workers that wrote the engine's state."""
    zero_stage: int = 0
    """ZeRO stage that wrote the engine's state."""
    skipped: int = 0
    """Updates skipped so far, because their gradient was not finite."""
    first_loss: float = 0.0
    """Loss of the run's first step."""


def load_checkpoint(
    name: str | None, engine: Engine, recipe: Recipe, read: ReadSpec, node: str
) -> tuple[Position, list[LogLine]]:
    """Load a checkpoint of the run into the engine. A collective.

    Args:
        name: of the checkpoint, which is whole; None for a run that begins.
        engine: the engine.
        recipe: the resolved recipe.
        read: the training rows.
        node: identifies this worker's node.

    Returns:
        The checkpoint's position, or that of a new run; and what the checkpoint holds because it may not be logged.

    Raises:
        UserError: the checkpoint was written with other data, another model, another ZeRO stage or another version.
    """
    num_rows, stage = read.order.num_rows, recipe.deepspeed.zero_stage
    num_workers = torch.distributed.get_world_size()
    if name is None:
        return Position(num_rows=num_rows, data=read.digest, num_workers=num_workers, zero_stage=stage), []
    wanted = engine.files_to_load if isinstance(engine, LoadsPart) else all_files
    with fetched(RunFolder(recipe.run_uri), name, wanted, node, recipe.checkpoint.scratch) as folder:
        position = _parse_position((folder / POSITION_FILE).read_bytes(), f"{recipe.run_uri}/{name}")
        if stage != position.zero_stage:
            raise UserError(
                f"the run's checkpoint was written with ZeRO stage {position.zero_stage}",
                field="deepspeed.zero_stage",
                value=stage,
                fix="resume with that stage, or start a new run under another name (name=...)",
            )
        if num_rows != position.num_rows:
            raise UserError(
                f"the training data has {num_rows} rows now and had {position.num_rows} when the run began",
                field="data.train",
                fix="resume with the same files, or start a new run under another name (name=...)",
            )
        if position.data and read.digest != position.data:
            raise UserError(
                "the files of the training data have changed since the run began",
                field="data.train",
                fix="resume with the same files, or start a new run under another name (name=...)",
            )
        with _mismatch_is_an_error_of_the_user(f"{recipe.run_uri}/{name}"):
            engine.load(folder)
        unlogged = read_log(folder / LOG_FILE)
    return replace(position, num_workers=num_workers), unlogged


def newest_position(run: RunFolder, warn: Callable[[str], None]) -> Position | None:
    """Return the position of a run's newest complete checkpoint, without reading its state; None if there is none.

    Args:
        run: the run folder.
        warn: takes a sentence about every damaged checkpoint that is newer.

    Raises:
        UserError: another version wrote it.
        OSError: the store cannot be read now.
    """
    for name in checkpoint_names(run):
        try:
            return _parse_position(read_checked(run, name, POSITION_FILE), f"{run.uri}/{name}")
        except Damage as damage:
            warn(f"checkpoint {run.uri}/{name} is not used: {damage}")
    return None


def _parse_position(data: bytes, where: str) -> Position:
    try:
        return Position(**json.loads(data))
    except (TypeError, ValueError):
        raise UserError(
            "the run's checkpoint was written by another version of orpo-ray",
            field=f"{where}/{POSITION_FILE}",
            fix="finish the run with that version, or start a new run under another name (name=...)",
        ) from None


@contextmanager
def _mismatch_is_an_error_of_the_user(where: str) -> Iterator[None]:
    """Turn what engines raise where a whole checkpoint does not fit the model, as after a restart, into a UserError.

    What a disk, a device, a lost worker or a lack of memory causes stays as it is.
    """
    try:
        yield
    except (torch.distributed.DistError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, LookupError, ValueError, AssertionError, PickleError) as error:
        if isinstance(error, RuntimeError) and _OF_LOST_WORKERS.search(str(error)):
            raise
        raise UserError(
            f"the checkpoint is whole, but does not fit the model of this recipe: "
            f"{type(error).__name__}: {one_line(error)}",
            field=where,
            fix="resume with the recipe and the library versions that the run began with, or start a new run under "
            "another name (name=...)",
        ) from error


def save_final(engine: Engine, model: PairModel, recipe: Recipe, adapter: str = FIRST_ADAPTER) -> None:
    """Write `final/`: the processor with the whole model, or with its adapters alone. A collective.

    The folder appears whole or not at all.

    Args:
        engine: holds the weights.
        model: the model.
        recipe: the resolved recipe.
        adapter: peft's name of the adapter that the engine trains.

    Raises:
        TrainingDiverged: a weight is not finite.
    """
    if not engine.has_finite_weights():
        raise TrainingDiverged(
            f"a weight is not finite; {FINAL}/ was not written, and the last checkpoint is kept\n  fix: {FIX}"
        )
    adapted = is_adapted(model.model)
    state = engine.consolidated_weights(trained_only=adapted)
    if torch.distributed.get_rank() != 0:
        return
    state = {name.removeprefix("model."): value for name, value in state.items()}
    folder = RunFolder(recipe.run_uri)
    scratch = folder.path / f".{FINAL}"
    shutil.rmtree(scratch, ignore_errors=True)
    if adapted:
        save_adapter(model.model, state, recipe.model, scratch, adapter)
    else:
        pretrained: Any = model.model
        pretrained.config.use_cache = True  # off during training only
        pretrained.save_pretrained(scratch, state_dict=state)
    load_processor(recipe.model.id, recipe.model.revision, recipe.model.trust_remote_code).save_pretrained(scratch)
    for file in scratch.iterdir():
        file.chmod(scratch.stat().st_mode & 0o666)  # by the umask; safetensors lets only the owner read its files
    folder.move_model(scratch, FINAL)
