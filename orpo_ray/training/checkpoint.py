"""Save, find, load: the engine's state with the data position in it, and the model that a run ends with."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ray.train

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import UserError
from orpo_ray.model.adapters import save_adapter
from orpo_ray.model.loading import is_adapted
from orpo_ray.processing.processor import load_processor
from orpo_ray.storage.run_folder import FINAL, RunFolder
from orpo_ray.training.deepspeed import Engine

POSITION_FILE = "position.json"
_TAG = "engine"


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` steps are done, so all sample indices below step * pairs_per_step are consumed.

    bad and seen count rows so far. num_rows and data say which set it is, which the order depends on. num_workers and
    zero_stage say who can read the engine's state.
    """

    step: int = 0
    bad: int = 0
    seen: int = 0
    num_rows: int = 0
    data: str = ""
    num_workers: int = 1
    zero_stage: int = 0


def save_checkpoint(engine: Engine, position: Position, metrics: Mapping[str, float]) -> None:
    """Write the engine's state and the position, and hand both to Ray Train. A collective."""
    rank = ray.train.get_context().get_world_rank()
    with tempfile.TemporaryDirectory() as scratch:
        # Every worker writes its own part into its own folder; Ray Train merges them into one checkpoint.
        (Path(scratch) / _TAG).mkdir()
        engine.ds.save_checkpoint(scratch, tag=_TAG, exclude_frozen_parameters=True)
        if rank == 0:
            (Path(scratch) / POSITION_FILE).write_text(json.dumps(asdict(position)))
        ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(scratch))


def load_latest(engine: Engine, recipe: Recipe, read: ReadSpec) -> Position:
    """Load the run's latest checkpoint, if it has one, into the engine. A collective. Raises UserError."""
    checkpoint, num_rows = ray.train.get_checkpoint(), read.order.num_rows
    num_workers = ray.train.get_context().get_world_size()
    stage = recipe.deepspeed.zero_stage
    if checkpoint is None:
        return Position(num_rows=num_rows, data=read.digest, num_workers=num_workers, zero_stage=stage)
    with checkpoint.as_directory() as folder:
        position = Position(**json.loads((Path(folder) / POSITION_FILE).read_text()))
        if stage != position.zero_stage:
            raise UserError(
                f"the run's checkpoint was written with ZeRO stage {position.zero_stage}",
                field="deepspeed.zero_stage",
                value=stage,
                fix="resume with that stage, or start another run under another name",
            )
        if stage > 0 and num_workers != position.num_workers:
            raise UserError(
                f"the run's checkpoint is sharded over {position.num_workers} worker(s)",
                field="scaling.num_workers",
                value=num_workers,
                fix="resume with as many workers; only ZeRO stage 0 resumes with another number",
            )
        if num_rows != position.num_rows:
            raise UserError(
                f"the training data has {num_rows} rows now, and had {position.num_rows} when the run began",
                field="data.train",
                fix="resume with the same files, or start another run under another name",
            )
        if position.data and read.digest != position.data:
            raise UserError(
                "the files of the training data are not those that the run began with",
                field="data.train",
                fix="resume with the same files, or start another run under another name",
            )
        engine.ds.load_checkpoint(folder, tag=_TAG, load_module_strict=False)
    return replace(position, num_workers=num_workers)


def save_final(engine: Engine, recipe: Recipe) -> None:
    """Write `final/`, the whole model or its adapters alone, with the processor. A collective.

    The folder appears whole or not at all.
    """
    pair_model = engine.ds.module
    adapted = is_adapted(pair_model.model)
    if recipe.deepspeed.zero_stage == 3:
        # Of an adapted model the base is not gathered: nothing of it is saved.
        state = engine.ds._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapted)
    else:
        state = pair_model.state_dict()
    if ray.train.get_context().get_world_rank() != 0:
        return
    state = {name.removeprefix("model."): value for name, value in state.items()}
    folder = RunFolder(recipe.run_uri)
    scratch = folder.path / f".{FINAL}"
    shutil.rmtree(scratch, ignore_errors=True)
    if adapted:
        save_adapter(pair_model.model, state, recipe.model, scratch)
    else:
        pair_model.model.config.use_cache = True  # off for training only
        pair_model.model.save_pretrained(scratch, state_dict={name: value.cpu() for name, value in state.items()})
    load_processor(recipe.model.id, recipe.model.revision, recipe.model.trust_remote_code).save_pretrained(scratch)
    folder.move_model(scratch, FINAL)
