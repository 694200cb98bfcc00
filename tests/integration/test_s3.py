"""Object stores with a real client: data read from S3 and runs written to S3, while the server fails at times."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from orpo_ray.data.images import load_image
from orpo_ray.data.sources import list_sources
from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.evaluate_run import evaluate_run
from orpo_ray.exporting.export import ExportOptions, export_run
from orpo_ray.model.loading import load_model
from orpo_ray.storage.files import TooLarge, image_folder, locate, read_bytes
from orpo_ray.storage.lease import LEASE_FILE, Lease
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.trackers import MultiLogger
from orpo_ray.training.checkpoint_choice import checkpoint_names, choose_by_hand, choose_newest, clean, inspect
from orpo_ray.training.launch import launch_training
from orpo_ray.training.unlogged import LogLine, log_missing
from support.commands import without_cluster
from support.endless_saves import save_step, saver_of
from support.finished_runs import finished_run
from support.runs import last_step, wait_until
from support.s3_server import BUCKET, Faults, s3_server
from support.sources import ids_of, read_all, rows, spec_of, write_jsonl, write_tar
from support.tiny_runs import losses, tiny_recipe, write_pairs


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with s3_server(monkeypatch) as faults:
        yield faults


def upload(folder: Path, to: str) -> None:
    filesystem, path = locate(f"s3://{BUCKET}/{to}")
    pafs.copy_files(str(folder), path, destination_filesystem=filesystem)


def test_every_kind_of_file_is_read_while_the_server_fails(s3: Faults, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(40)), tmp_path / "a.parquet", row_group_size=8)
    write_jsonl(tmp_path / "b.jsonl", rows(20))
    (tmp_path / "c.json").write_text(json.dumps(rows(10)))
    members = [(f"{row['id']}.json", json.dumps(row).encode()) for row in rows(10)]
    write_tar(tmp_path / "d.tar", members)
    table = pa.Table.from_pylist(rows(10))
    with pa.OSFile(str(tmp_path / "e.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    upload(tmp_path, "data")
    s3.active = True
    expected = [f"r{i}" for count in (40, 20, 10, 10, 10) for i in range(count)]
    assert ids_of(f"s3://{BUCKET}/data") == expected
    for _ in range(3):
        assert ids_of(f"s3://{BUCKET}/data/*.parquet") == expected[:40]
    assert all(s3.injected.values()), s3.injected


def test_images_are_read_only_from_the_folder_of_their_rows(s3: Faults, tmp_path: Path) -> None:
    write_pairs(tmp_path, 12)
    upload(tmp_path, "deep/set")
    s3.active = True
    uri = f"s3://{BUCKET}/deep/set/train.jsonl"
    for row in read_all(spec_of([uri])):
        assert row["image_root"] == f"s3://{BUCKET}/deep/set"
        assert load_image(row["images"][0], image_folder(row["image_root"])).size == (64, 64)
        for path in ("../../other.png", "/bucket/deep/set/train.jsonl", "images/../../x.png", "s3://bucket/x.png"):
            with pytest.raises(RowError) as error:
                load_image({"bytes": None, "path": path}, image_folder(row["image_root"]))
            assert error.value.reason in ("unsafe_path", "unsupported_url")
        with pytest.raises(RowError) as error:
            load_image({"bytes": None, "path": "images/none.png"}, image_folder(row["image_root"]))
        assert error.value.reason == "missing_image"


@pytest.mark.parametrize("uri", [f"s3://{BUCKET}/none", "s3://no-such-bucket/a.jsonl", f"s3://{BUCKET}/none/*.parquet"])
def test_what_is_not_there_is_one_message(s3: Faults, uri: str) -> None:
    with pytest.raises(UserError, match=r"data\.train"):
        list_sources({uri: 1.0}, "data.train")


def test_a_large_object_is_not_read(s3: Faults, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(1000))
    upload(tmp_path, "large")
    folder = image_folder(f"s3://{BUCKET}/large")
    assert len(folder.read("a.png", 1000)) == 1000
    with pytest.raises(TooLarge, match="1000 bytes exceed the limit of 999"):
        folder.read("a.png", 999)


def test_a_remote_run_folder_grows_by_pushes(s3: Faults, tmp_path: Path) -> None:
    s3.active = True
    folder = RunFolder(f"s3://{BUCKET}/runs/a")
    assert not folder.has("metrics.jsonl")
    folder.pull("metrics.jsonl", "final")
    (folder.path / "metrics.jsonl").write_text("1\n")
    folder.push("metrics.jsonl", "bad_rows.jsonl")
    (folder.path / ".final").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder.path / ".final" / name).write_text(name)
    folder.move_model(folder.path / ".final", "final")
    again = RunFolder(folder.uri)
    assert again.has_model("final")
    assert not again.has_model("fin")
    again.pull("metrics.jsonl", "final")
    assert (again.path / "metrics.jsonl").read_text() == "1\n"
    assert (again.path / "final" / "model.safetensors").read_text() == "model.safetensors"
    # Replacing the model leaves no files of the old one: a folder must not contain both a full model and adapters.
    (folder.path / ".final").mkdir()
    (folder.path / ".final" / "adapter_config.json").write_text("{}")
    folder.move_model(folder.path / ".final", "final")
    assert again.has_model("final")
    assert not again.has("final/config.json")
    mirror = again.path
    del again
    assert not mirror.exists()


def test_checkpoints_in_s3_prove_themselves_too(s3: Faults) -> None:
    saver, run = saver_of(f"s3://{BUCKET}/proved"), RunFolder(f"s3://{BUCKET}/proved/run")
    s3.active = True
    for step in (1, 2):
        save_step(saver, step)
    newest, before = checkpoint_names(run)
    assert [inspect(run, name).step for name in (newest, before)] == [2, 1]
    s3.active = False
    filesystem, path = locate(f"{run.uri}/{newest}/engine/4.pt")
    with filesystem.open_output_stream(path) as file:
        file.write(bytes([4]) * 99_999 + b"!")
    warnings: list[str] = []
    assert choose_newest(run, warnings.append) == before
    assert warnings == [
        f"checkpoint {run.uri}/{newest} is not used: engine/4.pt has another checksum than when it was written"
    ]
    filesystem.delete_file(path)
    assert inspect(run, newest).damage == "engine/4.pt is missing"
    with pytest.raises(UserError, match=f"{before}: step 1, whole"):
        choose_by_hand(run, newest)
    clean(run, before, keep=2)
    assert checkpoint_names(run) == [before]
    assert choose_newest(RunFolder(f"s3://{BUCKET}/proved/none"), warnings.append) is None


def test_a_run_in_s3_is_exported_there(s3: Faults, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "adapted", model={"lora": {"r": 4}})
    upload(finished_run(recipe, load_model(recipe.model, torch.device("cpu"), 0)), "runs/adapted")
    s3.active, s3.period = True, 30
    folder = RunFolder(f"s3://{BUCKET}/runs/adapted")
    over = ExportOptions(adapter=True, overwrite=True, output=f"{folder.uri}/export")
    for options, name in (
        (ExportOptions(), "export"),
        (over, "export"),
        (ExportOptions(adapter=True), "export-adapter"),
    ):
        exported = export_run(folder.uri, options, Console(file=io.StringIO()))
        assert exported.uri == f"{folder.uri}/{name}"
        again = RunFolder(folder.uri)
        again.pull(name)
        assert sorted(path.name for path in (again.path / name).iterdir()) == exported.files
        assert "1,234 pairs" in (again.path / name / "README.md").read_text()
    with pytest.raises(UserError, match="already exists"):
        export_run(folder.uri, ExportOptions(), Console(file=io.StringIO()))


def pushed_step(folder: RunFolder) -> int:
    folder.pull("metrics.jsonl")
    return last_step(folder.path)


@pytest.mark.timeout(600)
def test_a_run_folder_in_s3_has_one_writer(s3: Faults) -> None:
    folders = [RunFolder(f"s3://{BUCKET}/runs/leased") for _ in range(2)]
    with Lease(folders[0], print):
        assert folders[1].has(LEASE_FILE)
        with pytest.raises(UserError, match="another run writes"), Lease(folders[1], print):
            pass
    with Lease(folders[1], print):
        pass
    assert not folders[0].has(LEASE_FILE)


def test_what_a_survivor_saved_is_logged_once(s3: Faults, tmp_path: Path) -> None:
    """The lines of a checkpoint that another worker saved for a lost rank 0, which had pushed some of them."""
    recipe = tiny_recipe(tmp_path, "survived", checkpoint={"storage": f"s3://{BUCKET}/runs"})
    lines = [LogLine(step, {"train/loss": float(step)}, []) for step in (1, 2, 3)]
    lost = MultiLogger.open(recipe, 0, print)
    for line in lines[:2]:
        lost.log(line.step, line.metrics)
    lost.close()
    found = MultiLogger.open(recipe, 3, print)
    log_missing(lines, found)
    found.close()
    folder = RunFolder(recipe.run_uri)
    folder.pull("metrics.jsonl")
    assert losses(folder.path) == {1: 1.0, 2: 2.0, 3: 3.0}


@pytest.mark.nightly
@pytest.mark.parametrize("is_killed", [False, True])
def test_a_run_lives_in_s3(ray_cluster: None, s3: Faults, tmp_path: Path, is_killed: bool) -> None:
    """Read data from S3, write checkpoints and model to S3, resume and evaluate, while the server fails at times."""
    steps = 40 if is_killed else 8  # enough to be killed before the end
    write_pairs(tmp_path / "data", 64)
    write_pairs(tmp_path / "data", 16, "test")
    upload(tmp_path / "data", "data")
    sections: dict[str, Any] = {
        "data": {"train": f"s3://{BUCKET}/data/train.jsonl", "eval": f"s3://{BUCKET}/data/test.jsonl"},
        "checkpoint": {"storage": f"s3://{BUCKET}/runs", "every_steps": 4, "scratch": str(tmp_path / "scratch")},
        "optim": {"max_steps": steps},
    }
    name = "killed" if is_killed else "remote"
    recipe = tiny_recipe(tmp_path, name, **sections)
    path = tmp_path / "remote.yaml"
    path.write_text(recipe.to_yaml())
    s3.active, s3.period = True, 30
    folder = RunFolder(f"s3://{BUCKET}/runs/{name}")
    whole = [sys.executable, "-m", "orpo_ray", "train", str(path)]
    if is_killed:
        first = subprocess.Popen(whole, env=without_cluster(), stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: pushed_step(folder) >= 4, "the first checkpoint")
        finally:
            first.kill()
            first.wait()
        assert not folder.has("final/config.json")
    again = subprocess.run(whole, env=without_cluster(), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert folder.uri in again.stderr
    assert (tmp_path / "scratch").is_dir()
    assert launch_training(recipe, Console(file=io.StringIO())).was_finished
    folder.pull("metrics.jsonl", "final", "recipe.yaml")
    assert sorted(losses(folder.path)) == list(range(1, steps + 1))
    assert (folder.path / "final" / "model.safetensors").stat().st_size > 10**6
    overrides = [f"data.eval={tmp_path}/data/test.jsonl"]
    scored = evaluate_run(folder.uri, overrides, Console(file=io.StringIO())).metrics
    last = [line for line in map(json.loads, (folder.path / "metrics.jsonl").open()) if "eval/loss" in line][-1]
    assert scored["eval/loss"] == pytest.approx(last["eval/loss"], abs=1e-4)
    on_two = [sys.executable, "-m", "orpo_ray", "evaluate", folder.uri, *overrides, "--workers", "2", "--json"]
    done = subprocess.run(on_two, env=without_cluster(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["eval/loss"] == pytest.approx(scored["eval/loss"], abs=1e-5)
    assert all(s3.injected.values()), s3.injected
    for name in ("recipe.yaml", "metrics.jsonl"):
        assert b"test-secret-never-written" not in read_bytes(f"{folder.uri}/{name}")
