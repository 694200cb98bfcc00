"""Saving on a disk that is full or cannot be written to ends with one message, and earlier checkpoints are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.training import saving
from orpo_ray.training.checkpoint import Position
from orpo_ray.training.checkpoint_choice import SAVING, checkpoint_names, inspect
from orpo_ray.training.engine import Engine
from orpo_ray.training.saving import SaveFailed
from support.endless_saves import FiveFiles, save_step, saver_of
from support.small_disk import SmallDisk, small_disk

CHECKPOINT_BYTES = 500_000


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    """Room for two checkpoints and a half."""
    monkeypatch.setattr(saving, "ROOM_WAITS_S", (0.0, 0.0))
    with small_disk(tmp_path / "disk", CHECKPOINT_BYTES * 5 // 2) as mounted:
        (mounted.path / "run").mkdir()
        yield mounted


def saved_steps(disk: SmallDisk) -> list[int | None]:
    run = RunFolder(str(disk.path / "run"))
    assert not list((run.path / SAVING).glob("*")), "scratch was left"
    return [inspect(run, name).step for name in checkpoint_names(run)]


def test_room_is_looked_for_before_a_save_and_saving_goes_on_once_there_is(disk: SmallDisk) -> None:
    saver = saver_of(str(disk.path))
    save_step(saver, 1)
    save_step(saver, 2)
    engine = FiveFiles()
    engine.save = lambda folder: pytest.fail("nothing is written where there is no room")  # type: ignore[method-assign]
    with pytest.raises(SaveFailed, match=r"step 3 was not saved: it needs 0\.5 MB, and .* has 0\.\d MB free") as error:
        saver.save(cast(Engine, engine), Position(step=3))
    assert "fix: make room" in str(error.value)
    assert saved_steps(disk) == [2, 1]
    disk.remount(f"size={CHECKPOINT_BYTES * 4}")
    save_step(saver, 3)
    assert saved_steps(disk) == [3, 2]


class TorchFile(FiveFiles):
    """Saves as engines do."""

    def save(self, folder: Path) -> None:
        torch.save(torch.zeros(CHECKPOINT_BYTES), folder / "state.pt")


@pytest.mark.parametrize("engine", [FiveFiles(), TorchFile()], ids=["plain", "torch"])
def test_a_disk_that_fills_up_during_a_save_is_one_message(disk: SmallDisk, engine: Any) -> None:
    saver = saver_of(str(disk.path))
    save_step(saver, 1)
    (disk.path / "of-another-program").write_bytes(bytes(CHECKPOINT_BYTES * 5 // 4))
    saver._expected_bytes = 0
    with pytest.raises(SaveFailed, match=r"(?i)step 2 was not saved: .*no space left"):
        saver.save(engine, Position(step=2))
    assert saved_steps(disk) == [1]


def test_a_disk_that_refuses_is_one_message(disk: SmallDisk) -> None:
    saver = saver_of(str(disk.path))
    save_step(saver, 1)
    disk.remount("ro")
    with pytest.raises(SaveFailed, match=r"step 2 was not saved: .*Read-only file system"):
        save_step(saver, 2)
    disk.remount("rw")
    assert saved_steps(disk) == [1]


def test_errors_that_are_not_of_the_disk_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    class Broken(FiveFiles):
        def save(self, folder: Path) -> None:
            raise RuntimeError("of the device")

    with pytest.raises(RuntimeError, match="of the device"):
        saver_of(str(tmp_path)).save(cast(Engine, Broken()), Position(step=1))
    with pytest.raises(SaveFailed, match="does not exist on this worker's node"):
        save_step(saver_of(str(tmp_path / "elsewhere")), 1)
    assert os.listdir(tmp_path / "run") == [SAVING]
