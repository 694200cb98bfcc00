"""Checkpoints that prove themselves: every damage is recognized, the one before is taken, old ones are cleared."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.storage.scratch import clear_dead_scratch, make_scratch
from orpo_ray.training.checkpoint_choice import (
    RAY_SNAPSHOT,
    SAVING,
    checkpoint_names,
    choose_by_hand,
    choose_newest,
    clean,
    clear_saving,
    forget_ray_snapshot,
    inspect,
    new_name,
    prune,
)
from orpo_ray.training.manifest import Damage, Manifest, write_manifest
from orpo_ray.training.saving import Saver
from support.endless_saves import save_for_ever

WORKERS = 2


def save(run: Path, step: int, name: str | None = None) -> str:
    """Write a checkpoint of two workers as a run does."""
    name = name or f"checkpoint_{step:04}"
    for rank in range(WORKERS):
        scratch = run / f"scratch-{rank}"
        (scratch / "engine").mkdir(parents=True)
        (scratch / "engine" / f"shard-{rank}.pt").write_bytes(random.Random(step + rank).randbytes(200))
        (scratch / "engine" / f"empty-{rank}").touch()
        if rank == 0:
            (scratch / "position.json").write_text(json.dumps({"step": step}))
        write_manifest(scratch, step, rank, WORKERS)
        shutil.copytree(scratch, run / name, dirs_exist_ok=True)
        shutil.rmtree(scratch)
    return name


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    for step in (3, 6, 9):
        save(tmp_path, step)
    return RunFolder(str(tmp_path))


def chosen(run: RunFolder) -> tuple[str | None, list[str]]:
    warnings: list[str] = []
    return choose_newest(run, warnings.append), warnings


def test_the_newest_whole_checkpoint_is_chosen_without_a_word(run: RunFolder) -> None:
    assert chosen(run) == ("checkpoint_0009", [])


@pytest.mark.timeout(3600)  # every flip checks all bytes
@pytest.mark.parametrize("count", [50, pytest.param(5000, marks=pytest.mark.nightly)])
def test_one_changed_byte_anywhere_is_recognized(run: RunFolder, count: int) -> None:
    draw = random.Random(0)
    files = [path for path in files_of(run.path / "checkpoint_0009") if path.stat().st_size]
    for _ in range(count):
        path = draw.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= draw.randrange(1, 256)
        path.write_bytes(bad)
        name, warnings = chosen(run)
        assert name == "checkpoint_0006", path
        assert len(warnings) == 1
        assert f"{run.uri}/checkpoint_0009 is not used" in warnings[0]
        assert path.name in warnings[0]
        path.write_bytes(good)
    assert chosen(run) == ("checkpoint_0009", [])


def test_every_truncated_or_missing_file_is_recognized(run: RunFolder) -> None:
    for path in files_of(run.path / "checkpoint_0009"):
        good = path.read_bytes()
        for length in range(0, len(good), 40):
            path.write_bytes(good[:length])
            assert chosen(run)[0] == "checkpoint_0006", (path, length)
        path.unlink()
        assert chosen(run)[0] == "checkpoint_0006", path
        path.write_bytes(good)


def test_the_manifests_of_all_workers_and_of_one_save_are_needed(run: RunFolder) -> None:
    newest = run.path / "checkpoint_0009"
    (newest / "manifest-00001.json").rename(run.path / "kept")
    assert inspect(run, newest.name).damage == "the manifest of worker 1 is missing, so saving it did not end"
    shutil.copy(run.path / "checkpoint_0006" / "manifest-00001.json", newest)
    assert "of different checkpoints" in inspect(run, newest.name).damage
    shutil.copy(newest / "manifest-00000.json", newest / "manifest-00001.json")
    assert inspect(run, newest.name).damage == "manifest-00001.json is the manifest of worker 0"
    for manifest in newest.glob("manifest-*"):
        manifest.unlink()
    assert inspect(run, newest.name).damage == "it has no manifest, so saving it did not end"


def test_a_manifest_survives_the_way_to_a_file_and_nothing_else_does() -> None:
    manifest = Manifest(7, 1, 2, {"a/b": (5, "ff"), "c": (0, "00")})
    assert Manifest.from_json(manifest.to_json()) == manifest
    for data in (b"", b"{}", b"[]", b"3", b"\xff", manifest.to_json().strip(), manifest.to_json().replace(b"7", b"8")):
        with pytest.raises(Damage):
            Manifest.from_json(data)


def test_without_a_whole_checkpoint_the_run_begins_again_and_says_so(run: RunFolder) -> None:
    for name in checkpoint_names(run):
        (run.path / name / "position.json").unlink()
    name, warnings = chosen(run)
    assert name is None
    assert len(warnings) == 4
    assert "begins at step 0" in warnings[-1]
    assert len(checkpoint_names(run)) == 3, "what may be all that is left of a run is not deleted"
    assert chosen(RunFolder(str(run.path / "none"))) == (None, [])


def test_cleaning_keeps_the_chosen_and_the_complete_ones_before_it(run: RunFolder) -> None:
    for step in (12, 15, 18):
        save(run.path, step)
    (run.path / "checkpoint_0018" / "position.json").unlink()
    (run.path / "checkpoint_0012" / "manifest-00001.json").unlink()
    (run.path / SAVING / "0-dead").mkdir(parents=True)
    name, _ = chosen(run)
    assert name == "checkpoint_0015"
    clear_saving(run)
    clean(run, name, keep=2)
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint_0009", "checkpoint_0015"]
    clean(run, name, keep=1)
    assert checkpoint_names(run) == ["checkpoint_0015"]


def test_a_run_of_an_earlier_version_is_left_alone(run: RunFolder) -> None:
    snapshot = run.path / RAY_SNAPSHOT
    snapshot.write_text('{"torn')
    forget_ray_snapshot(run)
    assert not snapshot.exists()
    for manifest in run.path.glob("*/manifest-*"):
        manifest.unlink()
    forget_ray_snapshot(run)
    snapshot.write_text("{}")
    with pytest.raises(UserError, match="an earlier version"):
        forget_ray_snapshot(run)
    assert snapshot.exists()


def test_names_follow_each_other_and_the_oldest_are_pruned(run: RunFolder) -> None:
    shutil.rmtree(run.path / "checkpoint_0003")
    later = "checkpoint_2999-01-01_00-00-00.000000"  # by a clock that is ahead
    save(run.path, 12, later)
    name = new_name(checkpoint_names(run))
    assert name > later
    save(run.path, 15, name)
    assert new_name([]) < later
    prune(run, keep=2)
    assert checkpoint_names(run) == [name, later]


def test_a_checkpoint_chosen_by_hand_becomes_the_newest(run: RunFolder) -> None:
    choose_by_hand(run, f"{run.uri}/checkpoint_0006/")
    assert checkpoint_names(run) == ["checkpoint_0006", "checkpoint_0003"]
    choose_by_hand(run, "checkpoint_0003")
    assert checkpoint_names(run) == ["checkpoint_0003"]


@pytest.mark.parametrize("wanted", ["checkpoint_0004", "/elsewhere/checkpoint_0006", "checkpoint_0009", "", "final"])
def test_an_unknown_or_damaged_choice_is_one_message_with_all_there_are(run: RunFolder, wanted: str) -> None:
    (run.path / "checkpoint_0009" / "position.json").write_text("{}")
    with pytest.raises(UserError) as error:
        choose_by_hand(run, wanted)
    assert "checkpoint_0009: position.json has 2 bytes instead of 11" in str(error.value)
    assert "checkpoint_0006: step 6, whole" in str(error.value)
    assert ("is damaged" if wanted == "checkpoint_0009" else "not a checkpoint of this run") in str(error.value)
    assert len(checkpoint_names(run)) == 3


@pytest.mark.timeout(3600)  # each of the processes imports what it saves with
@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.nightly)])
def test_killed_saves_leave_whole_checkpoints_and_bounded_litter(tmp_path: Path, count: int) -> None:
    """Many processes, one after the other, save in a loop and are killed at random moments."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([Saver.__module__])  # imports take seconds
    run = RunFolder(str(tmp_path / "run"))
    run.make()
    draw, last, torn = random.Random(0), 0, 0
    for _ in range(count):
        ready, told = processes.Pipe(duplex=False)
        saves = processes.Process(target=save_for_ever, args=(str(tmp_path), last + 1, told))
        saves.start()
        seconds = ready.recv()
        time.sleep(draw.uniform(0.0, 3 * seconds))
        saves.kill()
        saves.join()
        name, warnings = chosen(run)
        torn += bool(warnings) or any((run.path / SAVING).glob("*"))
        assert name is not None
        step = inspect(run, name).step
        assert step > last, "a checkpoint that was saved has gone"
        clear_saving(run)
        clean(run, name, keep=2)
        assert len(checkpoint_names(run)) <= 2
        last = step
    assert torn >= count // 10, "few kills fell into a save"


def test_scratch_of_dead_processes_is_removed_from_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = make_scratch()
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    left = tmp_path / mine.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    other_machine = tmp_path / f"orpo-ray-elsewhere-{dead.pid}-abc"
    for folder in (left, other_machine):
        folder.mkdir()
    assert clear_dead_scratch() == [], "one that is young may belong to a process that is starting"
    assert clear_dead_scratch(min_age_s=0.0) == [left]
    assert sorted(tmp_path.iterdir()) == sorted([mine, other_machine])
