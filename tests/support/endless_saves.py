"""A process that saves checkpoints until it is killed."""

from __future__ import annotations

import itertools
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

from orpo_ray.config.load import parse_recipe
from orpo_ray.training.checkpoint import Position
from orpo_ray.training.engine import Engine
from orpo_ray.training.saving import Saver


class FiveFiles:
    """What a `Saver` needs of an engine."""

    checkpoint_bytes = 500_000

    def has_finite_weights(self) -> bool:
        return True

    def save(self, folder: Path) -> None:
        (folder / "engine").mkdir()
        for number in range(5):
            (folder / "engine" / f"{number}.pt").write_bytes(bytes([number]) * 100_000)


def saver_of(storage: str, rank: int = 0, num_workers: int = 1) -> Saver:
    """Return the saver of a worker of a run `<storage>/run`."""
    raw = {"name": "run", "model": {"id": "orpo-ray/tiny-smolvlm"}, "data": {"train": "easy-vqa:train"}}
    recipe = parse_recipe(raw | {"checkpoint": {"storage": storage}})
    return Saver(recipe, cast(Engine, FiveFiles()), rank=rank, num_workers=num_workers, workers_of_node=num_workers)


def begin_save(saver: Saver, step: int) -> None:
    """Save. Into an object store, the upload goes on afterwards."""
    saver.save(cast(Engine, FiveFiles()), Position(step=step))


def save_step(saver: Saver, step: int) -> None:
    begin_save(saver, step)
    saver.finish()


def save_for_ever(storage: str, first: int, ready: Connection) -> None:
    """Save one checkpoint, send the seconds it took, then save until the process is killed."""
    saver = saver_of(storage)
    began = time.perf_counter()
    save_step(saver, first)
    ready.send(time.perf_counter() - began)
    for step in itertools.count(first + 1):
        save_step(saver, step)
