"""Checkpoints are uploaded to an object store beside the training, one at a time, and the manifest is the last file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.training.checkpoint import Position
from orpo_ray.training.checkpoint_choice import checkpoint_names, inspect
from orpo_ray.training.engine import SavesAlone
from orpo_ray.training.saving import SaveFailed, Saver
from support.endless_saves import FiveFiles, begin_save, save_step, saver_of
from support.runs import wait_until
from support.s3_server import BUCKET, Faults, s3_server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with s3_server(monkeypatch) as faults:
        yield faults
        faults.takes_writes.set()


def saver_and_run(name: str) -> tuple[Saver, RunFolder]:
    return saver_of(f"s3://{BUCKET}/{name}"), RunFolder(f"s3://{BUCKET}/{name}/run")


def steps(run: RunFolder) -> list[int | None]:
    return [inspect(run, name).step for name in checkpoint_names(run)]


def test_a_save_returns_before_the_upload_ends_and_the_next_one_waits(s3: Faults) -> None:
    saver, run = saver_and_run("beside")
    save_step(saver, 1)
    s3.takes_writes.clear()
    begin_save(saver, 2)
    assert (saver.pending, saver.is_uploading) == (2, True)
    assert steps(run) == [1]
    third = threading.Thread(target=begin_save, args=(saver, 3), daemon=True)
    third.start()
    third.join(0.5)
    assert third.is_alive()
    s3.takes_writes.set()
    third.join(60)
    assert not third.is_alive()
    assert saver.pending == 3
    assert set(steps(run)[-2:]) <= {1, 2}, "the second one is whole, with or without files of the third"
    saver.finish()
    assert steps(run) == [3, 2], "the first one is too old"
    assert (saver.pending, saver.is_uploading) == (None, False)
    files = [path for path in s3.written if checkpoint_names(run)[0] in path]
    assert files[-1].endswith("manifest-00000.json")
    assert len(files) == 7


def test_a_checkpoint_is_settled_without_a_wait_once_it_is_whole(s3: Faults) -> None:
    saver, run = saver_and_run("settled")
    for step in (1, 2, 3):
        begin_save(saver, step)
        wait_until(lambda: not saver.is_uploading, "the upload")
        assert saver.pending == step
        saver.settle()
        assert saver.pending is None
    saver.end_upload()
    assert steps(run) == [3, 2]


def test_a_failed_upload_is_one_message_and_earlier_checkpoints_stay(s3: Faults) -> None:
    saver, run = saver_and_run("refused")
    save_step(saver, 1)
    s3.refuses_writes = True
    begin_save(saver, 2)
    saver.end_upload()
    assert saver.is_uploading, "a part that failed is missing for ever"
    for raises in (saver.check, saver.finish, lambda: begin_save(saver, 3)):
        with pytest.raises(SaveFailed, match=r"the checkpoint of step 2 was not saved: .*ACCESS_DENIED") as error:
            raises()
        assert "resumes from the previous checkpoint" in str(error.value)
    s3.refuses_writes = False
    assert steps(run) == [1]


class WholeState(FiveFiles):
    updates = 3

    def save_alone(self, folder: Path, updates: int) -> bool:
        self.save(folder)
        return True


def test_a_worker_that_saves_alone_does_not_write_into_the_pending_checkpoint(s3: Faults) -> None:
    saver, run = saver_and_run("alone")
    s3.takes_writes.clear()
    begin_save(saver, 2)  # of which the store has no file yet
    threading.Timer(0.5, s3.takes_writes.set).start()
    saver._newest = "checkpoint_9999"  # as by a clock that is ahead
    assert saver.save_alone(cast(SavesAlone, WholeState()), Position(step=3), 3, [])
    assert "checkpoint_9999_1" in checkpoint_names(run)
    saver.finish()
    assert set(steps(run)) == {2, 3}
