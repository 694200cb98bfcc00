"""Runs with damaged checkpoints and full disks on a real Ray: the curve is that of an uninterrupted run."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.training.checkpoint_choice import RAY_SNAPSHOT, checkpoint_names, inspect
from orpo_ray.training.launch import launch_training
from orpo_ray.training.saving import SaveFailed
from support.runs import run
from support.small_disk import small_disk
from support.tiny_runs import losses, tiny_recipe

SAVES = {"every_steps": 3, "keep": 3}


@pytest.fixture(scope="module")
def storage(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an uninterrupted run, `whole`, of 10 steps and checkpoints of steps 6, 9 and 10."""
    storage = tmp_path_factory.mktemp("runs")
    run(tiny_recipe(storage, "whole", checkpoint=SAVES))
    return storage


def steps_of(recipe: Recipe) -> dict[int | None, str]:
    """Return step -> name of a run's checkpoints, oldest first."""
    folder = RunFolder(recipe.run_uri)
    return {inspect(folder, name).step: name for name in reversed(checkpoint_names(folder))}


def stopped_after_step_9(storage: Path, name: str) -> Recipe:
    """Return a run as one leaves it that is killed after step 9; its lines of metrics are marked as old."""
    recipe, folder = tiny_recipe(storage, name, checkpoint=SAVES), storage / name
    shutil.copytree(storage / "whole", folder)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / steps_of(recipe)[10])
    lines = [json.dumps(line | {"old": 1}) for line in read_jsonl(folder / "metrics.jsonl") if line["step"] <= 9]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return recipe


def resume(recipe: Recipe, from_checkpoint: str | None = None) -> str:
    """Resume a run, and return what the console showed."""
    console = Console(file=io.StringIO(), width=1000)
    launch_training(recipe, console, from_checkpoint=from_checkpoint)
    return console.file.getvalue()  # type: ignore[attr-defined]


def check(recipe: Recipe, storage: Path, resumed_after: int) -> None:
    """Check that the curve is the uninterrupted one, and that the steps after `resumed_after` alone are new."""
    folder = Path(recipe.run_uri)
    assert losses(folder) == pytest.approx(losses(storage / "whole"), abs=1e-4)
    old = [line["step"] for line in read_jsonl(folder / "metrics.jsonl") if "old" in line]
    assert max(old) == resumed_after
    assert (folder / "final").is_dir()


def test_flipped_bytes_and_a_torn_snapshot_cost_the_steps_since_the_checkpoint_before(storage: Path) -> None:
    recipe = stopped_after_step_9(storage, "flipped")
    folder, steps = Path(recipe.run_uri), steps_of(recipe)
    assert list(steps) == [6, 9]
    state = folder / steps[9] / "engine" / "replicated.pt"
    data = bytearray(state.read_bytes())
    for place in random.Random(0).sample(range(len(data)), 8):
        data[place] ^= 0xFF
    state.write_bytes(data)
    (folder / RAY_SNAPSHOT).write_text('{"ray_version": "2.60.0", "checkpoint_res')
    shown = resume(recipe)
    assert f"checkpoint {folder}/{steps[9]} is not used: engine/replicated.pt has another checksum" in shown
    assert shown.count("warning:") == 1
    check(recipe, storage, resumed_after=6)
    assert list(steps_of(recipe)) == [6, 9, 10]
    assert not (folder / steps[9]).exists()
    assert not list((folder / ".saving").iterdir())


def test_a_checkpoint_can_be_chosen_by_hand(storage: Path) -> None:
    recipe = stopped_after_step_9(storage, "by-hand")
    with pytest.raises(UserError, match=r"not a checkpoint of this run \(found 'none'\)"):
        resume(recipe, "none")
    resume(recipe, steps_of(recipe)[6])
    check(recipe, storage, resumed_after=6)
    with pytest.raises(UserError, match=r"--from-checkpoint: the run is finished"):
        resume(recipe, steps_of(recipe)[6])


def test_a_whole_checkpoint_of_another_model_is_an_error_of_the_user(storage: Path) -> None:
    """The recipe in the run folder was changed by hand, so that the checkpoint has weights of another model."""
    stopped_after_step_9(storage, "mismatch")
    other = tiny_recipe(storage, "mismatch", checkpoint=SAVES, model={"lora": {"r": 4}})
    (storage / "mismatch" / "recipe.yaml").write_text(other.with_absolute_paths().to_yaml())
    before = (storage / "mismatch" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="is whole, but does not fit the model of this recipe: KeyError") as error:
        resume(other)
    newest = steps_of(other)[9]
    assert error.value.field == f"{storage}/mismatch/{newest}"
    assert (storage / "mismatch" / "metrics.jsonl").read_text() == before


@pytest.mark.nightly
def test_a_sharded_checkpoint_of_another_model_is_an_error_of_the_user(storage: Path) -> None:
    sections: dict[str, Any] = {"checkpoint": SAVES, "optim": {"max_steps": 3}, "deepspeed": {"zero_stage": 2}}
    run(tiny_recipe(storage, "sharded", **sections))
    folder = storage / "sharded"
    shutil.rmtree(folder / "final")
    other = tiny_recipe(storage, "sharded", **sections, model={"lora": {"r": 4}})
    (folder / "recipe.yaml").write_text(other.with_absolute_paths().to_yaml())
    with pytest.raises(UserError, match="is whole, but does not fit the model of this recipe"):
        resume(other)


def test_a_full_disk_ends_a_run_with_one_message_and_it_goes_on_with_room(storage: Path, tmp_path: Path) -> None:
    newest = storage / "whole" / steps_of(tiny_recipe(storage, "whole"))[10]
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", size * 5 // 2) as disk:
        recipe = tiny_recipe(disk.path, "full", checkpoint={"every_steps": 3, "keep": 2})
        with pytest.raises(SaveFailed, match="step 9 was not saved: it needs"):
            run(recipe)
        assert list(steps_of(recipe)) == [3, 6]
        disk.remount(f"size={size * 8}")
        run(recipe)
        assert losses(Path(recipe.run_uri)) == pytest.approx(losses(storage / "whole"), abs=1e-4)
        assert list(steps_of(recipe)) == [9, 10]
