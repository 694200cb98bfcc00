"""Checkpoints go to an object store beside the training, one at a time, and each node fetches what it reads of them."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.training.checkpoint import Position
from orpo_ray.training.checkpoint_choice import checkpoint_names, inspect
from orpo_ray.training.engine import SavesAlone
from orpo_ray.training.fetching import all_files, fetched
from orpo_ray.training.saving import SaveFailed, Saver
from support.endless_saves import FiveFiles, begin_save, save_step, saver_of
from support.runs import wait_until
from support.s3_server import BUCKET, Faults, s3_server
from support.worker_group import WorkerGroup


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


def save_all(rank: int, workers: int, storage: str, saved: list[int]) -> None:
    """A worker that saves checkpoints of these steps."""
    saver = saver_of(storage, rank, workers)
    for step in saved:
        save_step(saver, step)


def test_nothing_is_deleted_while_another_worker_uploads(s3: Faults) -> None:
    storage, run = f"s3://{BUCKET}/two", RunFolder(f"s3://{BUCKET}/two/run")
    with workers_of_this_store() as workers:
        workers.run(save_all, storage, [1, 2])
        assert steps(run) == [2, 1]
        s3.written.clear()
        s3.held = "manifest-00001"
        s3.takes_writes.clear()
        with ThreadPoolExecutor(1) as threads:
            third = threads.submit(workers.run, save_all, storage, [3])
            try:
                wait_until(lambda: any(path.endswith("manifest-00000.json") for path in s3.written), "the first worker")
                wait([third], timeout=1)
                assert steps(run) == [None, 2, 1]
            finally:
                s3.takes_writes.set()
            third.result()
    assert steps(run) == [3, 2]


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


def fetched_by(rank: int, workers: int, nodes: list[str], scratch: str) -> list[str]:
    """What a worker finds that reads the first file and one of its own."""
    run = RunFolder(f"s3://{BUCKET}/fetched/run")

    def wanted(files: Collection[str], writers: int) -> list[str]:
        assert writers == 1
        return [file for file in files if file.endswith(("0.pt", f"{rank + 1}.pt"))]

    with fetched(run, checkpoint_names(run)[0], wanted, nodes[rank], scratch) as folder:
        found = [path for path in folder.rglob("*") if path.is_file()]
        assert all(path.read_bytes() == bytes([int(path.stem)]) * 100_000 for path in found)
        return sorted(path.name for path in found)


@pytest.mark.parametrize("nodes", [["a", "a"], ["a", "b"]])
def test_a_node_fetches_what_its_workers_read_once(s3: Faults, tmp_path: Path, nodes: list[str]) -> None:
    saver, _ = saver_and_run("fetched")
    save_step(saver, 1)
    s3.read.clear()
    with workers_of_this_store() as workers:
        found = workers.run(fetched_by, nodes, str(tmp_path))
    both = nodes[0] == nodes[1]
    assert found == ([["0.pt", "1.pt", "2.pt"]] * 2 if both else [["0.pt", "1.pt"], ["0.pt", "2.pt"]])
    read = Counter(path.rpartition("/")[2] for path in s3.read if path.endswith(".pt"))
    assert read == ({"0.pt": 1, "1.pt": 1, "2.pt": 1} if both else {"0.pt": 2, "1.pt": 1, "2.pt": 1})
    assert not list(tmp_path.iterdir()), "scratch was left"


@contextmanager
def workers_of_this_store() -> Iterator[WorkerGroup]:
    """Two processes that know the server, unlike those that were started before it."""
    workers = WorkerGroup(2)
    try:
        workers.run(use_store, {name: value for name, value in os.environ.items() if name.startswith("AWS_")})
        yield workers
    finally:
        workers.close()


def use_store(rank: int, workers: int, variables: dict[str, str]) -> None:
    os.environ |= variables


def test_a_file_that_was_changed_is_not_loaded(s3: Faults, tmp_path: Path) -> None:
    saver, run = saver_and_run("changed")
    save_step(saver, 1)
    name = checkpoint_names(run)[0]
    changed = tmp_path / "3.pt"
    changed.write_bytes(bytes([3]) * 99_999 + b"!")
    run.upload(changed, f"{name}/engine/3.pt")
    with fetched(run, name, lambda files, _: [file for file in files if "3.pt" not in file], "a", None) as folder:
        assert (folder / "position.json").is_file()
    with pytest.raises(OSError, match=r"engine/3\.pt has another checksum"), fetched(run, name, all_files, "a", None):
        pytest.fail("it was found to be whole")
